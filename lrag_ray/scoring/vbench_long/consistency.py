"""The formula of both consistency dimensions, for frames of a clip and for first frames of clips alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

CONSISTENCY_FORMULA = (
    "Mean over the frames of a clip of the mean cosine similarity to the frame before and to the first frame ({inside}"
    "); averaged with the same over the first frames of all clips of the video ({across}), mapped to its scale"
)
"""For people; `inside` and `across` are the networks."""


def consistency(features: Tensor) -> list[float]:
    """Similarity of each frame but the first to its predecessor and to the first, from features [T, C].

    ``s_i = (max(0, cos(f_{i-1}, f_i)) + max(0, cos(f_0, f_i))) / 2``, each 0..1; the score is their mean.
    """
    unit = F.normalize(features.float(), dim=1)
    to_previous = F.cosine_similarity(unit[:-1], unit[1:])
    to_first = F.cosine_similarity(unit[:1], unit[1:])
    values: list[float] = ((to_previous.clamp(min=0).double() + to_first.clamp(min=0).double()) / 2).tolist()
    return values

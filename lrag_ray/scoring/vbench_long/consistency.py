"""The formula of both consistency dimensions, for frames of a clip and for first frames of clips alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def consistency(features: Tensor) -> list[float]:
    """Similarity of each frame but the first to its predecessor and to the first, from features [T, C].

    ``s_i = (max(0, cos(f_{i-1}, f_i)) + max(0, cos(f_0, f_i))) / 2``, each 0..1; the score is their mean.
    """
    unit = F.normalize(features.float(), dim=1)
    to_previous = F.cosine_similarity(unit[:-1], unit[1:])
    to_first = F.cosine_similarity(unit[:1], unit[1:])
    values: list[float] = ((to_previous.clamp(min=0).double() + to_first.clamp(min=0).double()) / 2).tolist()
    return values

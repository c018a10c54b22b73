"""Aesthetic quality: LAION's linear rating of CLIP ViT-L/14 features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lrag_ray.scoring.vbench_long.dimension import Dimension, Measured
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames


def features(frames: ClipFrames, networks: Networks) -> Tensor:
    """CLIP image features [T, 768]."""
    return networks.clip_features(networks.clip_l14, frames.clip_input)


def score(frames: ClipFrames, networks: Networks) -> Measured:
    """Mean rating over ten, about 0..1; per frame the rating."""
    ratings = networks.aesthetic_head(F.normalize(features(frames, networks), dim=1)).squeeze(1)
    return Measured((ratings / 10).mean().item(), tuple(ratings.tolist()))


DIMENSION = Dimension(
    name="aesthetic_quality",
    title="Aesthetic quality",
    formula="Mean over frames of the LAION aesthetic predictor on CLIP ViT-L/14, as a share of 10",
    networks=("clip_vitl14", "laion_linear"),
    score=score,
)

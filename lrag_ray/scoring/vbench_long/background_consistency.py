"""Background consistency: CLIP ViT-B/32 features of the frames of a clip; DreamSim embeddings from clip to clip."""

from __future__ import annotations

import torch
from torch import Tensor

from lrag_ray.scoring.vbench_long.consistency import CONSISTENCY_FORMULA, consistency
from lrag_ray.scoring.vbench_long.dimension import Dimension, Measured, SlowFeatures, mean_of
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.preprocess import SIDE, ClipFrames, resize


def features(frames: ClipFrames, networks: Networks) -> Tensor:
    """CLIP image features [T, 512]."""
    return networks.clip_features(networks.clip_b32, frames.clip_input)


def score(frames: ClipFrames, networks: Networks) -> Measured:
    """Mean similarity of frames, 0..1."""
    return mean_of(consistency(features(frames, networks)), "two frames")


def slow_features(first_frames: Tensor, networks: Networks) -> Tensor:
    """DreamSim embeddings [N, 1792] of uint8 frames [N, 3, H, W], which lose their aspect ratio."""
    parts = [
        networks.dreamsim(resize(part.float(), (SIDE, SIDE), "bicubic", antialias=True) / 255)
        for part in first_frames.split(networks.batch.frames)
    ]
    return torch.cat(parts)


DIMENSION = Dimension(
    name="background_consistency",
    title="Background consistency",
    formula=CONSISTENCY_FORMULA.format(inside="CLIP ViT-B/32", across="DreamSim"),
    networks=("clip_vitb32",),
    score=score,
    slow=SlowFeatures(
        ("dino_vitb16", "dreamsim_clip_vitb16", "dreamsim_open_clip_vitb16", "dreamsim_ensemble_lora"), slow_features
    ),
)

"""Subject consistency: DINO features of the frames of a clip; DINOv2 features from clip to clip."""

from __future__ import annotations

import torch
from torch import Tensor

from lrag_ray.scoring.vbench_long.consistency import CONSISTENCY_FORMULA, consistency
from lrag_ray.scoring.vbench_long.dimension import Dimension, Measured, SlowFeatures, mean_of
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.preprocess import (
    DINOV2_RESIZE,
    IMAGENET,
    SIDE,
    ClipFrames,
    centre_crop,
    normalise,
    resize_shorter,
)


def features(frames: ClipFrames, networks: Networks) -> Tensor:
    """DINO CLS tokens [T, 768]; frames keep their aspect ratio."""
    parts = [
        networks.dino(normalise(resize_shorter(part.float(), SIDE, "bilinear", antialias=False) / 255, IMAGENET))
        for part in frames.uint8.split(networks.batch.frames)
    ]
    return torch.cat(parts)


def score(frames: ClipFrames, networks: Networks) -> Measured:
    """Mean similarity of frames, 0..1."""
    return mean_of(consistency(features(frames, networks)), "two frames")


def slow_features(first_frames: Tensor, networks: Networks) -> Tensor:
    """DINOv2 CLS tokens [N, 768] of uint8 frames [N, 3, H, W]."""
    parts = [
        networks.dinov2(normalise(centre_crop(_for_dinov2(part.float()), SIDE) / 255, IMAGENET))
        for part in first_frames.split(networks.batch.frames)
    ]
    return torch.cat(parts)


def _for_dinov2(frames: Tensor) -> Tensor:
    return resize_shorter(frames, DINOV2_RESIZE, "bicubic", antialias=True)


DIMENSION = Dimension(
    name="subject_consistency",
    title="Subject consistency",
    formula=CONSISTENCY_FORMULA.format(inside="DINO ViT-B/16", across="DINOv2 ViT-B/14"),
    networks=("dino_vitb16",),
    score=score,
    slow=SlowFeatures(("dinov2_vitb14",), slow_features),
)

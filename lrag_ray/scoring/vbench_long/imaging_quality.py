"""Imaging quality: MUSIQ, trained on SPAQ, on every frame."""

from __future__ import annotations

import torch
from torch import Tensor

from lrag_ray.scoring.vbench_long.dimension import Dimension, Measured, mean_of
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames, resize

LONGER_SIDE = 512


def shrink(images: Tensor) -> Tensor:
    """0..255 images [T, 3, H, W] with a longer side of at most 512 pixels, as 0..1."""
    height, width = images.shape[2:]
    if max(height, width) > LONGER_SIDE:
        scale = LONGER_SIDE / max(height, width)
        images = resize(images, (int(scale * height), int(scale * width)), "bilinear", antialias=False)
    return images / 255


def ratings(frames: ClipFrames, networks: Networks) -> Tensor:
    """MUSIQ ratings [T], about 0..100."""
    parts = frames.uint8.split(networks.batch.frames)
    return torch.cat([networks.musiq.rate(shrink(part.float())) for part in parts])


def score(frames: ClipFrames, networks: Networks) -> Measured:
    """Mean rating of the frames, 0..100."""
    return mean_of(ratings(frames, networks).double().tolist(), "a frame")


DIMENSION = Dimension(
    name="imaging_quality",
    title="Imaging quality",
    formula="Mean over frames of MUSIQ (SPAQ), as a share of 100",
    networks=("musiq_spaq",),
    score=score,
    full_scale=100,
)

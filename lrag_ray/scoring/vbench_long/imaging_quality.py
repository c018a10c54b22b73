"""Imaging quality: MUSIQ, trained on SPAQ, on every frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrag_ray.scoring.vbench_long.dimension import Measured, mean_of
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NetworkName
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames, resize

NETWORKS: tuple[NetworkName, ...] = ("musiq_spaq",)
LONGER_SIDE = 512


def shrink(images: Tensor) -> Tensor:
    """0..255 images [T, 3, H, W] with a longer side of at most 512 pixels, as 0..1."""
    height, width = images.shape[2:]
    if max(height, width) > LONGER_SIDE:
        scale = LONGER_SIDE / max(height, width)
        images = resize(images, (int(scale * height), int(scale * width)), "bilinear", antialias=False)
    return images / 255


def rate(images: Tensor, musiq: Any) -> Tensor:
    """MUSIQ ratings [T], about 0..100, of 0..1 images [T, 3, H, W].

    pyiqa pads the two smaller scales to square token sequences and masks the padding out of the attention. All
    images here have one size, so that the padding is the same in all and is left away.
    """
    from pyiqa.data.multiscale_trans_util import get_multiscale_patches

    patches = get_multiscale_patches((images - 0.5) * 2, **musiq.data_preprocess_opts)
    patches = patches[:, patches[0, :, -1].bool()]
    # A module in training mode takes patches instead of images; its layers stay in evaluation mode.
    musiq.training = True
    try:
        ratings: Tensor = musiq(patches).flatten()
    finally:
        musiq.training = False
    return ratings


def score(frames: ClipFrames, networks: Networks) -> Measured:
    """Mean rating of the frames, 0..100."""
    ratings = [rate(shrink(part.float()), networks.musiq) for part in frames.uint8.split(networks.batch.frames)]
    return mean_of(torch.cat(ratings).double().tolist(), "a frame")

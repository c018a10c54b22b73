"""Motion smoothness: how well AMT-S guesses each odd frame from its even neighbours."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from lrag_ray.scoring.vbench_long.correlation import MIN_POSITIONS, pairs_at_once
from lrag_ray.scoring.vbench_long.dimension import Dimension, Measured, UnscorableClipError
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames, pad_to_multiple

MULTIPLE = 16
MIN_SIDE = 8 * MIN_POSITIONS
"""Pixels of the shorter padded side, of which AMT correlates every eighth."""


def middle_frames(frames: ClipFrames, networks: Networks) -> Tensor:
    """Predicted odd frames, uint8 [pairs, 3, H, W], truncated and not rounded."""
    height, width = frames.uint8.shape[2:]
    padded, (top, left) = pad_to_multiple(frames.uint8[::2].float() / 255, MULTIPLE)
    if min(padded.shape[2:]) < MIN_SIDE:
        raise UnscorableClipError(
            f"frames of {width}x{height} are too small for AMT-S, which needs sides of {MIN_SIDE}"
        )
    pairs = pairs_at_once(networks.batch.pairs, *padded.shape[2:])
    predicted = []
    for before, after in zip(padded[:-1].split(pairs), padded[1:].split(pairs), strict=True):
        images = networks.amt.middle(before, after)[:, :, top : top + height, left : left + width]
        predicted.append((images * 255).clamp(0, 255).to(torch.uint8))
    return torch.cat(predicted)


def score(frames: ClipFrames, networks: Networks) -> Measured:
    """(255 - mean absolute error) / 255; per pair the error in grey levels."""
    if len(frames) < 3:
        raise UnscorableClipError(f"needs three frames, the clip has {len(frames)}")
    predicted = middle_frames(frames, networks)
    skipped = frames.uint8[1::2][: len(predicted)]
    errors = (predicted.int() - skipped.int()).abs().double().mean(dim=(1, 2, 3)).tolist()
    return Measured((255 - fmean(errors)) / 255, tuple(errors))


DIMENSION = Dimension(
    name="motion_smoothness",
    title="Motion smoothness",
    formula="1 - mean absolute difference, as a share of 255, between every second frame and what AMT-S interpolates "
    "from its neighbours",
    networks=("amt_s",),
    score=score,
)

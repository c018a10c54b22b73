"""Flow discontinuity: it sees jumps where blocks meet, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lrag_ray.scoring.flow_discontinuity import Deviations, discontinuity
from lrag_ray.scoring.preview.measures import measures
from lrag_ray.wan.vae import video_frames

BLOCKS = 4
STARTS = [video_frames(3 * block) for block in range(1, BLOCKS)]
"""First video frames of the blocks but the first: 9, 21, 33."""
FRAMES = video_frames(3 * BLOCKS)


def scene(jumps_at: list[int]) -> NDArray[np.uint8]:
    """A soft texture that moves 1 pixel per frame, and 3 pixels more where a frame of `jumps_at` begins."""
    tiles = np.random.default_rng(1).integers(40, 220, (8, 64, 3)).astype(np.float64)
    wide = tiles.repeat(8, axis=0).repeat(8, axis=1)
    for axis in (0, 1):
        for _ in range(3):
            wide = (np.roll(wide, 3, axis) + wide + np.roll(wide, -3, axis)) / 3
    steps = [1 + 3 * (frame in jumps_at) for frame in range(FRAMES)]
    moved = [np.roll(wide, -shift, axis=1)[:, :96] for shift in np.cumsum(steps)]
    return np.stack(moved).round().astype(np.uint8)


def value(frames: NDArray[np.uint8]) -> float:
    return measures(frames, 16, frames_per_block=3)["flow_discontinuity"]


def test_jumps_at_block_boundaries_alone_raise_it() -> None:
    smooth, at_blocks, inside = (
        value(scene([])),
        value(scene(STARTS)),
        value(scene([start + 6 for start in STARTS[:-1]])),
    )
    assert abs(smooth) < 0.3
    assert at_blocks > 0.8
    assert inside < -0.5


def test_the_formula_on_given_deviations() -> None:
    """Given 1 at boundary pairs, 0.5 beside them and 0.25 elsewhere, D is (1 - 0.25) / (1 + 0.25)."""
    pairs = np.arange(1, FRAMES - 2)
    distance = np.min([np.abs(pairs - (start - 1)) for start in STARTS], axis=0)
    values = np.where(distance == 0, 1.0, np.where(distance == 1, 0.5, 0.25)).tolist()
    assert discontinuity(values, FRAMES, 3) == pytest.approx(0.6)
    shorter = video_frames(6)
    assert discontinuity(values, shorter, 3) == discontinuity(values[: shorter - 3], shorter, 3) == pytest.approx(0.6)
    assert discontinuity(values, FRAMES, 3, cold_chunk=3) != pytest.approx(0.6), "other frames begin the blocks"
    assert discontinuity([0.0] * 40, FRAMES, 3) == 0, "nothing moves"
    assert discontinuity(values, FRAMES, 1000) is None, "one block has no boundary"
    assert discontinuity([], 1, 3) is None
    assert discontinuity([float("nan")] * 40, FRAMES, 3) is None


def test_pieces_of_a_video_give_the_deviations_of_the_whole() -> None:
    frames = scene(STARTS)
    whole, pieces = Deviations(), Deviations()
    whole.add_frames(list(frames))
    for first, last in ((0, 1), (1, 2), (2, 20), (20, 20), (20, FRAMES)):
        pieces.add_frames(list(frames[first:last]))
    assert len(whole.values) == FRAMES - 3
    assert pieces.values == pytest.approx(whole.values, abs=1e-6)

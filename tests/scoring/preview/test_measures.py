"""The preview suite: each measure answers to what it is named after, in its direction and within its range."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lrag_ray.scoring.preview.measures import MEASURES, measures

Frames = npt.NDArray[np.uint8]


def scene(frames: int = 24, *, speed: int = 0, seed: int = 0) -> Frames:
    """A soft texture that moves `speed` pixels to the left per frame."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(60, 200, (8, 64, 3)).astype(np.float64)
    wide = tiles.repeat(8, axis=0).repeat(8, axis=1)
    for axis in (0, 1):
        for _ in range(3):
            wide = (np.roll(wide, 3, axis) + wide + np.roll(wide, -3, axis)) / 3
    moved = [np.roll(wide, -speed * t, axis=1)[:, :96] for t in range(frames)]
    return np.stack(moved).round().astype(np.uint8)


def brightened(frames: Frames, by: npt.NDArray[np.float64]) -> Frames:
    shifted: Frames = (frames + by[:, None, None, None]).clip(0, 255).astype(np.uint8)
    return shifted


def test_a_still_video() -> None:
    values = measures(scene(), 16)
    sharpness = values.pop("sharpness")
    assert 0 < sharpness < 1
    assert values.pop("motion_amount") < 1e-6
    assert values == {
        "exposure_drift": 0,
        "colour_drift": 0,
        "sharpness_drift": 0,
        "motion_smoothness": 1,
        "flicker": 0,
        "frozen_share": 1,
    }


def test_exposure_drift_is_the_change_of_luma() -> None:
    values = measures(brightened(scene(32), np.repeat([0.0, 51.0], 16)), 16)
    assert values["exposure_drift"] == pytest.approx(0.2, abs=0.005)
    assert values["colour_drift"] < 0.05, "brightness alone is no colour drift"


def test_colour_drift_sees_a_tint_and_not_exposure() -> None:
    frames = scene(32)
    frames[16:, ..., 0] = 0
    values = measures(frames, 16)
    assert values["colour_drift"] > 0.5


def test_blur_lowers_sharpness_and_drifts() -> None:
    frames = scene(32)
    blurred = frames.astype(np.float64)
    for _ in range(8):
        blurred = (np.roll(blurred, 2, axis=2) + blurred + np.roll(blurred, -2, axis=2)) / 3
    blurred = blurred.round().astype(np.uint8)
    sharp, soft = measures(frames, 16), measures(blurred, 16)
    assert soft["sharpness"] < 0.8 * sharp["sharpness"]
    drifting = measures(np.concatenate([frames[:16], blurred[16:]]), 16)
    assert drifting["sharpness_drift"] == pytest.approx(1 - soft["sharpness"] / sharp["sharpness"], abs=0.02)


@pytest.mark.parametrize("speed", [1, 3])
def test_motion_amount_is_measured_in_diagonals_per_second(speed: int) -> None:
    values = measures(scene(speed=speed), 16)
    assert values["motion_amount"] == pytest.approx(16 * speed / math.hypot(64, 96), rel=0.1)
    assert values["frozen_share"] == 0


def test_jerky_motion_is_less_smooth_than_even_motion() -> None:
    even = scene(24, speed=2)
    # The same path at a stutter: one step of four pixels, one of none.
    stutter = even[np.arange(24) // 2 * 2]
    assert measures(stutter, 16)["motion_smoothness"] < 0.3 < 0.8 < measures(even, 16)["motion_smoothness"]


def test_flicker_is_found_and_a_slow_fade_is_none() -> None:
    flickering = brightened(scene(24), np.tile([0.0, 20.0], 12))
    fading = brightened(scene(24), np.linspace(0, 20, 24))
    assert measures(flickering, 16)["flicker"] == pytest.approx(20 / 255, abs=0.01)
    assert measures(fading, 16)["flicker"] < 0.005


def test_frozen_share_counts_the_stuck_pairs() -> None:
    moving = scene(13, speed=2)
    frames = np.concatenate([moving, np.repeat(moving[-1:], 12, axis=0)])
    assert measures(frames, 16)["frozen_share"] == pytest.approx(0.5)


def test_a_long_video_is_cut_without_a_trace() -> None:
    """The flow is computed in pieces of 64 pairs; even motion must stay even across the cuts."""
    assert measures(scene(140, speed=2), 16)["motion_smoothness"] > 0.9


def test_a_stream_is_as_good_as_an_array() -> None:
    def stream() -> Iterator[Frames]:
        yield from scene(9, speed=1)

    assert measures(stream(), 16) == measures(scene(9, speed=1), 16)


def test_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="without frames"):
        measures([], 16)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(1, 20), st.just(3)),
        elements=st.integers(0, 255),
    )
)
def test_every_value_lies_in_its_documented_range(frames: Frames) -> None:
    values = measures(frames, 16)
    assert list(values) == [measure.name for measure in MEASURES]
    for measure in MEASURES:
        assert measure.lower <= values[measure.name] <= measure.upper
        assert math.isfinite(values[measure.name])

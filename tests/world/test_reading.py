"""Reading true scenes, clean and degraded."""

from __future__ import annotations

import numpy as np
import pytest

from lrag_ray.world.reading import ABSENT, UNCLEAR, majority, pose_distance, read_frames
from lrag_ray.world.scenes import SKIES, SLOTS, THINGS, TURN, VIEW, Pixels, Scene, make_scene, things_in_view

ALL_THINGS = Scene(make_scene("reading").setting, tuple(range(THINGS)))


def degraded(frames: Pixels) -> Pixels:
    """Blurred by three pixels along the ride and noisy: about 25 dB."""
    soft = frames.astype(np.float64)
    soft = (np.roll(soft, 1, 2) + soft + np.roll(soft, -1, 2)) / 3
    noisy = soft + np.random.default_rng(3).normal(0, 8, frames.shape)
    return noisy.clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("worse", [False, True])
@pytest.mark.parametrize("offset", [0, 7, 15])
def test_every_thing_is_read_at_every_pose(worse: bool, offset: int) -> None:
    poses = np.arange(TURN, dtype=np.float64) + offset / 32
    frames = np.stack([ALL_THINGS.frame(pose) for pose in poses])

    seen = read_frames(degraded(frames) if worse else frames)

    assert pose_distance(seen.poses, poses).max() <= (3 / 32 if worse else 0)
    assert majority(seen.things).tolist() == list(range(THINGS))
    for pose, things in zip(poses, seen.things, strict=True):
        if not worse:
            assert {slot for slot in range(SLOTS) if things[slot] != ABSENT} == {s for s, _ in things_in_view(pose)}
    assert np.abs(seen.skies - SKIES[ALL_THINGS.setting.sky]).max() < 1


def test_an_empty_wall_and_a_blob_are_unclear() -> None:
    frames = np.stack([ALL_THINGS.frame(pose) for pose in range(TURN)])
    frames[:, 36:96] = frames[:, 36:96].mean((1, 2), keepdims=True).astype(np.uint8)
    seen = read_frames(frames)
    assert set(seen.things[seen.things != ABSENT].tolist()) == {UNCLEAR}
    assert np.nanmin(seen.distances) > 40


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"\[F, {VIEW}, {VIEW}, 3\], got \[2, 64, 64, 3\]"):
        read_frames(np.zeros((2, 64, 64, 3), np.uint8))

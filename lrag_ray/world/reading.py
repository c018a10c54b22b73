"""What a video of the world shows: the place of every frame, the things that stand there, the colour of the sky.

Nothing is learnt: the panorama without things is known but for the colours that the prompt names, so that a frame is
compared with every place of it, and every slot in view with the pictures of all 24 things.

Example::

    seen = read_frames(video[::4])  # one frame per latent frame
    seen.things[5]  # thing of each slot in frame 5, ABSENT or UNCLEAR
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrag_ray.world.scenes import (
    FOOT,
    FRAMES_PER_LATENT,
    HORIZON,
    RAIL,
    RING,
    SLOT,
    SLOTS,
    STEP,
    THING_SIZE,
    THINGS,
    TURN,
    VIEW,
    Pixels,
    Scene,
    Setting,
    background,
    things_in_view,
)

ABSENT, UNCLEAR = -1, -2
"""No thing is read: the slot is not wholly in view; what stands there is like none of the 24."""
UNCLEAR_ABOVE = 50.0
"""Root mean square distance from the nearest picture, in steps of 255, above which a thing is unclear.

Of things that the shipped VAE decodes from true codes, half are nearer than 13 and nine of ten nearer than 32; grey
blobs and a wall without things are farther than 52.
"""

_WIDTH, _HEIGHT = THING_SIZE
_MARGIN = (SLOT - _WIDTH) // 2
_EDGE = 2
"""Rows at the edge of a band that blur and compression mix with its neighbour."""
_WALL_ROWS = slice(HORIZON.start + _EDGE, FOOT - _HEIGHT - _EDGE)
"""The wall above the things."""
_RAIL_ROWS = slice(RAIL.start + _EDGE, RAIL.stop - _EDGE)
_SKY_ROWS = slice(0, HORIZON.start - _EDGE)

Floats = NDArray[np.float64]


class Seen(NamedTuple):
    """What F frames show."""

    poses: Floats
    """Places [F] in latent frames, 0 to 48, in steps of a pixel (1/32)."""
    things: NDArray[np.int64]
    """Thing of each slot [F, 24], ABSENT or UNCLEAR."""
    distances: Floats
    """Distance [F, 24] of each slot from the nearest picture (see `UNCLEAR_ABOVE`); NaN where absent."""
    skies: Floats
    """Mean colour of the sky [F, 3], 0 to 255."""


def read_frames(frames: Pixels) -> Seen:
    """Read frames [F, 128, 128, 3]. ValueError for another size."""
    if frames.shape[1:] != (VIEW, VIEW, 3):
        raise ValueError(f"frames of the world are [F, {VIEW}, {VIEW}, 3], got {list(frames.shape)}")
    lefts = _places(frames)
    poses = lefts / (FRAMES_PER_LATENT * STEP)
    things = np.full((len(frames), SLOTS), ABSENT)
    distances = np.full((len(frames), SLOTS), np.nan)
    pictures, energies = _pictures()
    for i, pose in enumerate(poses):
        for slot, column in things_in_view(pose):
            left = column + _MARGIN
            shown = frames[i, FOOT - _HEIGHT : FOOT, left : left + _WIDTH].reshape(-1).astype(np.float32)
            squares = energies[slot] - 2 * (pictures[slot] @ shown) + shown @ shown
            nearest = int(squares.argmin())
            distance = float(np.sqrt(max(squares[nearest], 0) / len(shown)))
            distances[i, slot] = distance
            things[i, slot] = nearest if distance <= UNCLEAR_ABOVE else UNCLEAR
    return Seen(poses, things, distances, frames[:, _SKY_ROWS].mean((1, 2), dtype=np.float64))


def majority(things: NDArray[np.int64]) -> NDArray[np.int64]:
    """Thing of each slot [24] over the frames [F, 24] that show it; UNCLEAR counts like a thing, ABSENT does not."""
    votes = np.stack([(things == thing).sum(0) for thing in (*range(THINGS), UNCLEAR)])
    won = votes.argmax(0)
    return np.where(votes.max(0) == 0, ABSENT, np.where(won == THINGS, UNCLEAR, won))


def pose_distance(a: Floats, b: Floats) -> Floats:
    """Distance of places around the ring, in latent frames, 0 to 24."""
    apart = np.abs(a - b) % TURN
    nearer: Floats = np.minimum(apart, TURN - apart)
    return nearer


def _places(frames: Pixels) -> NDArray[np.int64]:
    """Left edge [F] of each view on the panorama: the place where wall and rail differ least from what is shown."""
    shown = np.concatenate([frames[:, rows].mean(1, dtype=np.float64) for rows in (_WALL_ROWS, _RAIL_ROWS)], axis=2)
    bands = _bands()
    # sum_x (shown[x] - bands[left + x])^2 for all places at once, by circular correlation.
    spectrum = np.fft.rfft(shown, RING, axis=1).conj() * np.fft.rfft(bands, axis=0)
    matched = np.fft.irfft(spectrum.sum(2), RING, axis=1)
    square = (bands**2).sum(1)
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([square, square[:VIEW]]))])
    energy = sums[VIEW : VIEW + RING] - sums[:RING]
    lefts: NDArray[np.int64] = (energy - 2 * matched).argmin(1)
    return lefts


@cache
def _bands() -> Floats:
    """Colours of wall and rail [1536, 6] along the ring, the same in all settings."""
    ring = background(Setting("blue", "grass", "red"))
    return np.concatenate([ring[rows].mean(0) for rows in (_WALL_ROWS, _RAIL_ROWS)], axis=1)


@cache
def _pictures() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Every thing before the wall of every slot [slots, things, values], and the sums of squares [slots, things]."""
    setting = Setting("blue", "grass", "red")
    found = np.empty((SLOTS, THINGS, _HEIGHT * _WIDTH * 3), np.float32)
    for thing in range(THINGS):
        ring = Scene(setting, (thing,) * SLOTS).ring[FOOT - _HEIGHT : FOOT].reshape(_HEIGHT, SLOTS, SLOT, 3)
        found[:, thing] = ring[:, :, _MARGIN:-_MARGIN].transpose(1, 0, 2, 3).reshape(SLOTS, -1)
    return found, (found**2).sum(2)

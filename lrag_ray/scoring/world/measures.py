"""Measures of the world: a later turn against the first turn of the same video, and against the prompt.

The things along the ring are free, so that only a video's own first turn says which belong where. One frame is read
per latent frame, the last of its four.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lrag_ray.scoring.measure import Measure
from lrag_ray.world.reading import ABSENT, UNCLEAR, Floats, Seen, majority, pose_distance, read_frames
from lrag_ray.world.scenes import FRAMES_PER_LATENT, SKIES, TURN, Pixels, Setting

LAST_TURN = 5
"""Later turns are not measured."""
_PSNR_LIMIT = 60.0


def _turn(turn: int) -> tuple[Measure, ...]:
    suffix, title = ("", "") if turn == 2 else (f"_turn_{turn}", f", turn {turn}")
    return (
        Measure(
            f"identity{suffix}",
            f"Identity{title}",
            f"Share of the things of turn 1 that turn {turn} shows in the same place, kind and colour; a thing is read "
            "by majority over the frames that show it, and one that is unclear or not shown again is wrong; chance is "
            "about 0.04",
            lower=0,
            upper=1,
            higher_is_better=True,
        ),
        Measure(
            f"psnr{suffix}",
            f"PSNR{title}",
            f"Frames of turn {turn} against those of turn 1 that show the nearest place, dB, at most 60",
            lower=0,
            upper=_PSNR_LIMIT,
            higher_is_better=True,
        ),
        Measure(
            f"pose_error{suffix}",
            f"Pose error{title}",
            f"Mean distance in turn {turn} of the place shown from the true one, in latent frames",
            lower=0,
            upper=TURN / 2,
            higher_is_better=False,
        ),
        Measure(
            f"sky_drift{suffix}",
            f"Sky drift{title}",
            f"Mean distance in turn {turn} of the sky's colour from the prompt's, as a share of black to white",
            lower=0,
            upper=1,
            higher_is_better=False,
        ),
    )


MEASURES = _turn(2)
"""The dimensions: turn 2."""
LATER_TURNS = tuple(measure for turn in range(3, LAST_TURN + 1) for measure in _turn(turn))
"""The same of turns 3 to 5, which short videos lack."""


def measures(frames: Pixels, setting: Setting) -> dict[str, float]:
    """Values by measure name of frames [F, 128, 128, 3], one per latent frame from the start of the video.

    Turns that are not complete are left out. ValueError for fewer than two turns or frames of another size.
    """
    turns = min(len(frames) // TURN, LAST_TURN)
    if turns < 2:
        raise ValueError(f"{len(frames)} latent frames are less than two turns, which are {2 * TURN}")
    seen = read_frames(frames[: turns * TURN])
    true = np.array([setting.pose_at(FRAMES_PER_LATENT * i) for i in range(turns * TURN)])
    errors = pose_distance(seen.poses, true)
    drifts = np.linalg.norm(seen.skies - SKIES[setting.sky], axis=1) / (255 * np.sqrt(3))
    found: dict[str, float] = {}
    for turn in range(2, turns + 1):
        now = slice((turn - 1) * TURN, turn * TURN)
        values = (_identity(seen, turn), _psnr(frames, seen.poses, now), errors[now].mean(), drifts[now].mean())
        names = (measure.name for measure in _turn(turn))
        found |= {name: float(value) for name, value in zip(names, values, strict=True)}
    return found


def things_of(seen: Seen, turn: int) -> NDArray[np.int64]:
    """Thing of each slot [24] in `turn` by majority of its frames, or ABSENT or UNCLEAR."""
    return majority(seen.things[(turn - 1) * TURN : turn * TURN])


def things_back(seen: Seen, turn: int) -> list[bool | None]:
    """Whether each slot [24] has in `turn` the thing of turn 1; None where none can be read in turn 1."""
    both = zip(things_of(seen, 1), things_of(seen, turn), strict=True)
    return [None if a in (ABSENT, UNCLEAR) else bool(a == b) for a, b in both]


def _identity(seen: Seen, turn: int) -> float:
    shown = np.count_nonzero(things_of(seen, 1) != ABSENT)
    return things_back(seen, turn).count(True) / shown if shown else 0.0


def _psnr(frames: Pixels, poses: Floats, now: slice) -> float:
    nearest = pose_distance(poses[now, None], poses[None, :TURN]).argmin(1)
    square = np.mean((frames[now].astype(np.float32) - frames[:TURN][nearest]) ** 2, dtype=np.float64)
    return float(min(_PSNR_LIMIT, 10 * np.log10(255**2 / square))) if square else _PSNR_LIMIT

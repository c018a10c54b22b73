"""Flow discontinuity: how much more the motion of a video jumps where blocks of its rollout meet than inside them.

Let u_t be the optical flow from frame t to t + 1 (`lrag_ray.scoring.flow`) on frames of at most 128 px on their longer
side, and <.> the mean over pixels. The deviation of a pair from its neighbours is

    a_t = < | u_t - (u_(t-1) + u_(t+1)) / 2 | >

B is the mean of a_t over the pairs that cross a block boundary, W its mean over the pairs at least two pairs away from
every boundary (a jump also moves the deviation of its neighbours). Then

    D = (B - W) / (B + W)

from -1 to 1: 0 means that boundaries are as smooth as the rest, 1/2 that they jump three times as much. Where B + W is
below 1e-4 px nothing moves and D is 0. A video without a boundary, or without a pair away from all of them, has no
value. Deviations do not depend on blocks, so suites may store them and apply the blocks later.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrag_ray.scoring.flow import luma_of, optical_flow, reduced
from lrag_ray.scoring.measure import Measure
from lrag_ray.wan.vae import video_frames

FLOW_DISCONTINUITY = Measure(
    "flow_discontinuity",
    "Flow discontinuity",
    "(B - W) / (B + W) with the mean deviation of the optical flow from its neighbours in time at block boundaries, B, "
    "and within blocks, W",
    lower=-1,
    upper=1,
    higher_is_better=False,
)

STILL_BELOW = 1e-4
"""Flow in pixels below which nothing moves."""


class Deviations:
    """a_1, a_2, … of a video whose frames come in pieces."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._frames: list[Tensor] = []
        self._flow: Tensor | None = None

    def add_frames(self, frames: Sequence[NDArray[np.uint8]]) -> None:
        """The next frames, RGB [H, W, 3]."""
        small = [reduced(luma_of(torch.from_numpy(np.ascontiguousarray(frame)).float() / 255)) for frame in frames]
        pictures = [*self._frames, *small]
        self._frames = pictures[-1:]
        if len(pictures) > 1:
            stacked = torch.stack(pictures)
            self.add_flow(optical_flow(stacked[:-1], stacked[1:]))

    def add_flow(self, flow: Tensor) -> None:
        """The flow [N, 2, h, w] of the next pairs, instead of their frames."""
        joined = flow if self._flow is None else torch.cat([self._flow, flow])
        off = joined[1:-1] - (joined[:-2] + joined[2:]) / 2
        self.values += off.norm(dim=1).mean((1, 2)).tolist()
        self._flow = joined[-2:]


def discontinuity(
    deviations: Sequence[float], frames: int, frames_per_block: int, cold_chunk: int | None = None
) -> float | None:
    """D of the first `frames` frames from the deviations a_1, a_2, … of a video; None where it has no value.

    `frames_per_block` counts latent frames; with `cold_chunk` every chunk of this many was decoded like a new video.
    """
    values = np.array(deviations, dtype=np.float64)[: max(0, frames - 3)]
    pairs = np.arange(1, len(values) + 1)
    distance = np.full(len(values), len(values) + 2)
    latent_frames = frames_per_block
    # The pair (start - 1, start) crosses the boundary at frame `start`.
    while (start := video_frames(latent_frames, cold_chunk)) <= len(values) + 2:
        distance = np.minimum(distance, np.abs(pairs - (start - 1)))
        latent_frames += frames_per_block
    crossing, within = values[distance == 0], values[distance >= 2]
    if not len(crossing) or not len(within):
        return None
    at, inside = float(crossing.mean()), float(within.mean())
    if at + inside < STILL_BELOW:
        return 0.0
    found = (at - inside) / (at + inside)
    return found if abs(found) <= 1 else None

"""Scores over the time of the video: what the mean over a long video hides.

Clips of one cell (backbone, method, duration) begin at the same times, so the clips of all its videos are averaged per
start time, over prompts. Consistency is taken within the clip: the other half of its final score is one number per
video and flat over time by construction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrag_ray.scoring.bootstrap import Interval, intervals, prompt_means
from lrag_ray.scoring.ranks import RankBlock, Unit, VideoScore

_BAND_RESAMPLES = 1000
"""Bands are many and are read by eye."""


@dataclass(frozen=True)
class VideoClips:
    """Scores of the clips of one video at one duration."""

    video: VideoScore
    """Which video, and the means over its clips."""
    first_frames: Sequence[int]
    """First frame of every clip, in order."""
    frame_count: int
    """Frames of a clip."""
    fps: int
    in_clip: Mapping[str, NDArray[np.float64]]
    """Score within the clip [clips] by measure name."""
    final: Mapping[str, NDArray[np.float64]]
    """Final score [clips] by measure name: what the tables average."""


class DriftPoint(NamedTuple):
    """Mean over prompts of one dimension in the clips that begin at one time."""

    backbone: str
    method: str
    latent_frames: int
    """The duration."""
    measure: str
    clip: int
    """Index of the clip, from 0."""
    start_s: float
    """Where the clip begins."""
    prompts: int
    in_clip: Interval
    """Score within the clip, with its bootstrap band over prompts."""
    final: float
    """Mean of the final score."""


def drift(clips: Iterable[VideoClips], blocks: Sequence[RankBlock]) -> list[DriftPoint]:
    """Curves of every compared method in every block, over the units that the block's table is over.

    `clips` hold all videos of the blocks; without any there is no curve.
    """
    cells: dict[tuple[str, str, int], dict[Unit, VideoClips]] = {}
    for each in clips:
        key = each.video.backbone, each.video.method, each.video.latent_frames
        cells.setdefault(key, {})[each.video.unit] = each
    return [
        point
        for block in blocks
        if cells
        for row in block.compared
        for point in _curves(block, row.method, cells.get((block.backbone, row.method, block.latent_frames), {}))
    ]


def _curves(block: RankBlock, method: str, videos: Mapping[Unit, VideoClips]) -> Iterable[DriftPoint]:
    used = [videos[unit] for unit in block.weights]
    if not used:
        return
    first = used[0]
    count = len(first.first_frames)
    for name in first.in_clip:
        weights, inside = prompt_means(block.weights, np.stack([video.in_clip[name] for video in used]))
        _, final = prompt_means(block.weights, np.stack([video.final[name] for video in used]))
        bands = intervals(weights, inside, resamples=_BAND_RESAMPLES)
        final_means = weights @ final / weights.sum()
        for clip in range(count):
            yield DriftPoint(
                backbone=block.backbone,
                method=method,
                latent_frames=block.latent_frames,
                measure=name,
                clip=clip,
                start_s=first.first_frames[clip] / first.fps,
                prompts=block.prompts,
                in_clip=bands[clip],
                final=float(final_means[clip]),
            )

"""Drift as papers report it: quality in the first and in the last seconds, and motion where blocks meet.

For a video of clips c with scores s(c), each of the clips [b, e) in seconds: *first* is the mean of s over the clips
with e <= 5, *last* over those with b >= T - 5, where T is the end of the last clip. Means are taken per video, then
over the prompts of the rank table with its weights. A video whose ends share a clip has none.

Flow discontinuity (`lrag_ray.scoring.flow_discontinuity`) is one number per video, averaged likewise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lrag_ray.report.collect import ReportData
from lrag_ray.scoring.bootstrap import Interval, intervals, prompt_means
from lrag_ray.scoring.drift import VideoClips
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.ranks import RankBlock, Unit

ENDS_S = 5.0
"""Length of each end in seconds."""
_SHOWN = ("imaging_quality", "aesthetic_quality")
"""Dimensions that papers report at both ends."""


class Ends(NamedTuple):
    """One measure of one method at both ends of its videos."""

    measure: str
    first: float
    last: float
    change: Interval
    """Last minus first."""


class EndsTable(NamedTuple):
    """One backbone and duration."""

    block: RankBlock
    rows: Mapping[str, Sequence[Ends]]
    """By method; empty where none has such clips."""
    flow: Mapping[str, Interval]
    """Flow discontinuity by method; empty where none has it for all videos of the block."""

    @property
    def methods(self) -> list[str]:
        """Methods that have any of it, in the order of the rank table."""
        return [row.method for row in self.block.compared if row.method in self.rows or row.method in self.flow]


def ends_tables(data: ReportData) -> list[EndsTable]:
    """Tables of every block that has such clips, or flow discontinuities."""
    clips: dict[tuple[str, str, int], dict[Unit, VideoClips]] = {}
    for each in data.scores.clips:
        key = each.video.backbone, each.video.method, each.video.latent_frames
        clips.setdefault(key, {})[each.video.unit] = each
    found = []
    for block in data.blocks:
        rows: dict[str, list[Ends]] = {}
        for row in block.compared:
            videos = clips.get((block.backbone, row.method, block.latent_frames), {})
            if not block.weights or any(unit not in videos for unit in block.weights):
                continue
            for name in _SHOWN:
                pairs = [both_ends(videos[unit], name) for unit in block.weights]
                whole = [pair for pair in pairs if pair is not None]
                if len(whole) == len(pairs):
                    rows.setdefault(row.method, []).append(_ends(block, name, whole))
        flow = flow_discontinuities(data, block)
        if rows or flow:
            found.append(EndsTable(block, rows, flow))
    return found


def flow_discontinuities(data: ReportData, block: RankBlock) -> dict[str, Interval]:
    """Mean flow discontinuity of every compared method that has it for all videos of the block."""
    found: dict[str, dict[Unit, float]] = {}
    for video in data.scores.videos:
        value = video.values.get(FLOW_DISCONTINUITY.name, math.nan)
        if (video.backbone, video.latent_frames) == (block.backbone, block.latent_frames) and math.isfinite(value):
            found.setdefault(video.method, {})[video.unit] = value
    means = {}
    for row in block.compared:
        values = found.get(row.method, {})
        if block.weights and all(unit in values for unit in block.weights):
            column = np.array([[values[unit]] for unit in block.weights])
            (means[row.method],) = intervals(*prompt_means(block.weights, column))
    return means


def both_ends(video: VideoClips, measure: str) -> tuple[float, float] | None:
    """Means over the clips in the first and in the last `ENDS_S` seconds; None without the measure or where they share
    a clip."""
    if measure not in video.in_clip:
        return None
    begins = np.array(video.first_frames) / video.fps
    ends = begins + video.frame_count / video.fps
    first, last = ends <= ENDS_S, begins >= ends.max() - ENDS_S
    if not first.any() or not last.any() or (first & last).any():
        return None
    scores = video.in_clip[measure]
    return float(scores[first].mean()), float(scores[last].mean())


def _ends(block: RankBlock, measure: str, pairs: Sequence[tuple[float, float]]) -> Ends:
    values = np.array(pairs)
    columns = np.column_stack([values, values[:, 1] - values[:, 0]])
    first, last, change = intervals(*prompt_means(block.weights, columns))
    return Ends(measure, first.mean, last.mean, change)

"""Drift as papers report it: quality in the first and in the last seconds of a video, and the difference.

For a video of clips c with scores s(c), each of the clips [b, e) in seconds: *first* is the mean of s over the clips
with e <= 5, *last* over those with b >= T - 5, where T is the end of the last clip. Means are taken per video, then
over the prompts of the rank table with its weights. A video whose ends share a clip has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lrag_ray.report.collect import ReportData
from lrag_ray.scoring.bootstrap import Interval, intervals, prompt_means
from lrag_ray.scoring.drift import VideoClips
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
    """By method."""


def ends_tables(data: ReportData) -> list[EndsTable]:
    """Tables of every block that has such clips; none for suites without clips."""
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
        if rows:
            found.append(EndsTable(block, rows))
    return found


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

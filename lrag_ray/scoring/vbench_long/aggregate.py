"""From rows of clips to scores of videos and of the whole set, as VBench-Long computes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from lrag_ray.printable import counted
from lrag_ray.scoring.vbench_long.clips import ClipSpan, clip_length, spans
from lrag_ray.scoring.vbench_long.dimensions import DIMENSIONS, as_shares
from lrag_ray.scoring.vbench_long.rows import ScoreRow
from lrag_ray.scoring.vbench_long.slow_fast import Fused, fuse


class ClipScore(NamedTuple):
    """Final score of a clip in a dimension."""

    video: str
    span: ClipSpan
    dimension: str
    score: float
    """Fused for the consistency dimensions; 0..100 for imaging_quality, else 0..1."""
    parts: Fused | None
    """How a consistency score came about."""


class Unscored(NamedTuple):
    """A value that is missing from the means, and why."""

    video: str
    dimension: str
    """Empty where the whole video is missing."""
    reason: str
    pending: bool = False
    """It may still be scored."""


@dataclass(frozen=True)
class Aggregate:
    """Scores of a set of videos."""

    clips: list[ClipScore]
    per_video: dict[str, dict[str, float]]
    """Video, dimension: mean over the video's clips (imaging_quality 0..100)."""
    mean_over_clips: dict[str, float]
    """Dimension: the official global score, an unweighted mean over all clips of all videos, 0..1."""
    mean_of_video_means: dict[str, float]
    """Dimension: mean of the per-video means, in which a long video weighs no more than a short one, 0..1."""
    unscored: list[Unscored] = field(default_factory=list)
    """What is in no mean. A dimension that lacks one clip of a video leaves that whole video out."""


def aggregate(rows: Iterable[ScoreRow], durations: Mapping[str, int] | None = None) -> Aggregate:
    """Aggregate the rows of videos at one duration each.

    `durations` gives the frames of each video that count (nested durations: the prefix whose clips are taken) and
    which videos; without it, every video is taken as far as its clips go. Of rows with one key the first counts.

    Raises:
        ValueError: rows of more than one mode: they do not belong in one table.
    """
    kept = {row.key: row for row in reversed(list(rows))}.values()
    if len(modes := {row.mode for row in kept if row.kind != "failure"}) > 1:
        raise ValueError(f"rows of the modes {' and '.join(sorted(modes))} cannot be aggregated together")
    by_video: dict[str, list[ScoreRow]] = defaultdict(list)
    for row in kept:
        by_video[row.video].append(row)
    unscored: list[Unscored] = []
    clips: list[ClipScore] = []
    per_video: dict[str, dict[str, float]] = {}
    for video in sorted(by_video if durations is None else durations):
        found, missing = _video(video, by_video[video], None if durations is None else durations[video])
        clips += found
        unscored += missing
        if found:
            per_video[video] = _means(found)
    scores = _means(clips)
    if "subject_consistency" in scores:
        scores["subject_consistency"] = _subject_global(clips)
    video_means = {name: fmean(values[name] for values in per_video.values() if name in values) for name in scores}
    return Aggregate(clips, per_video, as_shares(scores), as_shares(video_means), unscored)


def _video(video: str, rows: Sequence[ScoreRow], duration: int | None) -> tuple[list[ClipScore], list[Unscored]]:
    failures = [row for row in rows if row.kind == "failure"]
    if failures or not rows:
        return [], [Unscored(video, "", failures[0].reason if failures else "not scored yet", not failures)]
    frame_count = duration or max((row.first_frame + row.frame_count for row in rows if row.kind == "clip"), default=0)
    expected = spans(frame_count, clip_length(rows[0].fps))
    clips: list[ClipScore] = []
    missing: list[Unscored] = []
    for dimension in DIMENSIONS:
        own = [row for row in rows if row.dimension == dimension]
        if not own:
            continue
        by_span = {ClipSpan(row.first_frame, row.frame_count): row for row in own if row.kind == "clip"}
        slow = next((r for r in own if r.kind == "clip_to_clip" and r.frame_count == frame_count), None)
        reason = next((r.reason for r in (*by_span.values(), *([slow] if slow else ())) if r.reason), "")
        absent = [span for span in expected if span not in by_span]
        pending = ""
        if absent:
            pending = f"{len(absent)} of {counted(len(expected), 'clip')} are not scored yet"
        elif DIMENSIONS[dimension].slow and slow is None and len(expected) > 1:
            pending = "clip to clip is not scored yet"
        if pending or reason:
            missing.append(Unscored(video, dimension, pending or reason, bool(pending)))
            continue
        clips += [_clip(by_span[span], slow) for span in expected]
    return clips, missing


def _clip(row: ScoreRow, slow: ScoreRow | None) -> ClipScore:
    assert row.score is not None
    span = ClipSpan(row.first_frame, row.frame_count)
    if DIMENSIONS[row.dimension].slow is None:
        return ClipScore(row.video, span, row.dimension, row.score, None)
    parts = fuse(row.dimension, row.score, slow.score if slow else None)
    return ClipScore(row.video, span, row.dimension, parts.fused, parts)


def _means(clips: Iterable[ClipScore]) -> dict[str, float]:
    by_dimension: dict[str, list[float]] = defaultdict(list)
    for clip in clips:
        by_dimension[clip.dimension].append(clip.score)
    return {name: fmean(by_dimension[name]) for name in DIMENSIONS if name in by_dimension}


def _subject_global(clips: Sequence[ClipScore]) -> float:
    """Mean over clips; where no video has two clips, over all frame pairs, as the official code falls back to."""
    own = [clip for clip in clips if clip.dimension == "subject_consistency"]
    if any(clip.parts and clip.parts.clip_to_clip is not None for clip in own):
        return fmean(clip.score for clip in own)
    pairs = [clip.span.frame_count - 1 for clip in own]
    return sum(clip.score * n for clip, n in zip(own, pairs, strict=True)) / sum(pairs)

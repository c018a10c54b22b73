"""VBench-Long row files of a run, in the layout that scoring writes, with values that the caller chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lrag_ray.scoring.vbench_long.clips import clip_length, spans
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, Mode
from lrag_ray.scoring.vbench_long.parquet import (
    frozen_folder,
    frozen_identity,
    rollout_folder,
    rows_to_parquet,
    video_identity,
)
from lrag_ray.scoring.vbench_long.rows import Kind, ScoreRow
from lrag_ray.scoring.vbench_long.slow_fast import MAPPING
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo, committed_videos

Value = Callable[[RolloutId, str, int], float]
"""Score from 0 to 1 of a rollout's clip in a dimension, by the clip's first frame."""

SLOW = 0.9
"""Clip-to-clip score of every video."""


def row(
    video: str, kind: Kind, dimension: str, first_frame: int, frame_count: int, score: float | None, **changes: object
) -> ScoreRow:
    """A row; `score` from 0 to 1 also for imaging quality."""
    if score is not None and dimension == "imaging_quality":
        score *= 100
    fields: dict[str, object] = {
        "fps": 16,
        "per_frame": (0.5,) * 4,
        "reason": "",
        "mode": "compat",
        "device": "cpu",
        "precision": "official",
        "torch": "2.12.1",
        "networks": "clip_vitb32:1a2b",
    }
    return ScoreRow(video, kind, dimension, first_frame, frame_count, score=score, **{**fields, **changes})  # type: ignore[arg-type]


def video_rows(
    videos: Sequence[CommittedVideo], value: Value, mode: Mode = "compat", dimensions: Sequence[str] = DIMENSION_NAMES
) -> list[ScoreRow]:
    """Rows of one rollout: the clips of its longest file for all durations, each clip once."""
    longest = videos[-1]
    identity = video_identity(longest.rollout.path, longest.video.sha256)
    length = clip_length(longest.fps)
    clips = dict.fromkeys(span for video in videos for span in spans(video.frames, length))
    rows = [
        row(identity, "clip", name, *span, value(longest.rollout, name, span.first_frame), mode=mode)
        for span in clips
        for name in dimensions
    ]
    return rows + [
        row(identity, "clip_to_clip", name, 0, video.frames, SLOW, mode=mode)
        for video in videos
        for name in MAPPING
        if name in dimensions and len(spans(video.frames, length)) > 1
    ]


def by_rollout(run: RolloutRun) -> dict[RolloutId, list[CommittedVideo]]:
    """Committed videos of each rollout, shortest first."""
    found: dict[RolloutId, list[CommittedVideo]] = {}
    for video in committed_videos(run):
        found.setdefault(video.rollout, []).append(video)
    return found


def store_rows(
    run: RolloutRun, rollout: RolloutId, rows: Sequence[ScoreRow], mode: Mode = "compat", name: str = "rows-a"
) -> None:
    """One row file of a rollout."""
    run.storage.write(f"{rollout_folder(mode, rollout.path)}/rows-a.parquet", rows_to_parquet(rows))


def score_run(run: RolloutRun, value: Value, mode: Mode = "compat") -> None:
    """Score every rollout of a run."""
    for rollout, videos in by_rollout(run).items():
        store_rows(run, rollout, video_rows(videos, value, mode), mode)


def store_frozen(
    run: RolloutRun, backbone: str, prompt_id: str, sample: int, score: float, mode: Mode = "compat", without: str = ""
) -> None:
    """The frozen control of one prompt: two clips that score alike."""
    video = frozen_identity(backbone, prompt_id, sample)
    rows = [row(video, "clip", name, first, 32, score, mode=mode) for name in DIMENSION_NAMES for first in (0, 32)]
    rows += [row(video, "clip_to_clip", name, 0, 64, 1.0, mode=mode) for name in MAPPING]
    rows = [replace(each, score=None, reason="too small") if each.dimension == without else each for each in rows]
    run.storage.write(f"{frozen_folder(mode, backbone, prompt_id, sample)}/rows-a.parquet", rows_to_parquet(rows))

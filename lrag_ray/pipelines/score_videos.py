"""Score any videos with VBench-Long: everything that `lrag-ray score FOLDER` does is `score_videos`.

::

    TO/<mode>/<name of the video, hashed>/rows-<token>.parquet    see lrag_ray.scoring.vbench_long.parquet
    TO/videos-<mode>.csv                                          one line per video and duration, written anew
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lrag_ray.config.schema import ScoringSection
from lrag_ray.config.videos import VideosConfig
from lrag_ray.engine.fan_out import FanOut, Item
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import INTERRUPTED, ConfigError
from lrag_ray.events import Listener, Notice, StageBegan, StageEnded, silent
from lrag_ray.pipelines.scoring import ScoringOutcome, collect, each_worker, worker_count
from lrag_ray.pipelines.video_list import ListedVideo, VideoList, list_videos
from lrag_ray.report.csv_text import csv_text
from lrag_ray.scoring.ranks import VideoScore, average_ranks
from lrag_ray.scoring.vbench_long.aggregate import Aggregate, aggregate
from lrag_ray.scoring.vbench_long.measures import vbench_long
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.parquet import is_untrained
from lrag_ray.scoring.vbench_long.pending import check_weights, last_file, refuse_mixture
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, DimensionName, Mode
from lrag_ray.scoring.vbench_long.rows import ScoreRow
from lrag_ray.scoring.vbench_long.score import IN_CLIP_NETWORKS, SLOW_NETWORKS
from lrag_ray.scoring.vbench_long.weights import WeightFiles
from lrag_ray.scoring.vbench_long.worker import RANDOM, VbenchTask, VbenchWork, prefix_frames, read_row_files
from lrag_ray.store.address import Storage


@dataclass(frozen=True)
class VideoResult:
    """A video at a duration."""

    path: str
    method: str
    backbone: str
    prompt: str
    sample: int
    duration_s: float | None
    """As the manifest names it."""
    clips: int
    scores: Mapping[str, float]
    """Mean over its clips by dimension, 0..1."""
    reason: str
    """What is missing and why; empty where nothing is."""


@dataclass(frozen=True)
class GroupResult:
    """The videos of a backbone, duration and method; without a manifest all videos."""

    backbone: str
    duration_s: float | None
    method: str
    videos: int
    """Videos that have a score."""
    clips: int
    mean_over_clips: Mapping[str, float]
    """The official global score: every clip weighs the same."""
    mean_of_video_means: Mapping[str, float]
    """Every video weighs the same."""
    average_rank: float | None
    """Among the methods of the same backbone and duration, over the prompts that all of them have; None where there is
    nothing to compare."""
    prompts_ranked: int


@dataclass(frozen=True)
class VideoScores:
    """How scoring videos ended."""

    exit_code: int
    """0 all done, 1 some videos have no score or miss a dimension, 130 interrupted."""
    to: str
    mode: Mode
    csv: str
    """Name of the table in `to`."""
    dimensions: Sequence[DimensionName]
    untrained: bool
    """The networks had random weights: the numbers mean nothing."""
    videos_scored: int
    """By this start."""
    groups: Sequence[GroupResult]
    videos: Sequence[VideoResult]
    failed: Mapping[str, str]
    """Reason by path."""
    seconds: float


def score_videos(
    target: str,
    config: VideosConfig,
    *,
    manifest: str | None = None,
    to: str | None = None,
    progress: Listener = silent,
) -> VideoScores:
    """Score the videos at `target` (folder, file, glob, or address of a bucket) into the folder or address `to`.

    The same call continues: rows are there as soon as a few clips are done. Raises UsageError for a target or manifest
    that cannot be used; ConfigError for another suite than vbench_long; WeightsError; StorageError; ClusterError.
    """
    began = time.monotonic()
    scoring = config.scoring
    if scoring.suite != "vbench_long":
        raise ConfigError(f"scoring.suite is {scoring.suite}, but videos outside a run are scored with vbench_long")
    if scoring.controls:
        raise ConfigError("scoring.controls belong to runs: other videos say nothing of their first method")
    if scoring.weights is not None and scoring.weights != RANDOM:
        scoring = scoring.model_copy(update={"weights": str(Path(scoring.weights).absolute())})
        config = config.model_copy(update={"scoring": scoring})
    listed = list_videos(target, manifest, config.storage)
    check_weights(scoring)
    for note in listed.notes:
        progress(Notice(note, warning=True))
    out = Storage(to or f"scores-{scoring.suite}", config.storage)
    out.probe()
    refuse_mixture(out, scoring.mode, scoring)
    exit_code, outcome = 0, ScoringOutcome(0, {})
    try:
        outcome = _score(listed, config, out, progress)
    except KeyboardInterrupt:
        progress(Notice("interrupted; the same command continues", warning=True))
        exit_code = INTERRUPTED
    rows = read_row_files(out, out.list_files(scoring.mode))
    by_video: dict[str, list[ScoreRow]] = {}
    for row in (row for found in rows.values() for row in found):
        by_video.setdefault(row.video, []).append(row)
    groups, videos = _results(listed.videos, by_video, scoring.dimensions, outcome.failures)
    table = f"videos-{scoring.mode}.csv"
    out.write(table, _csv(videos, scoring.dimensions).encode())
    failed = {f"{v.path}" + (f" at {v.duration_s:g} s" if v.duration_s else ""): v.reason for v in videos if v.reason}
    return VideoScores(
        exit_code=exit_code or int(bool(failed)),
        to=out.uri,
        mode=scoring.mode,
        csv=table,
        dimensions=scoring.dimensions,
        untrained=any(is_untrained(row) for video in listed.videos for row in by_video.get(_identity(video), ())),
        videos_scored=outcome.scored,
        groups=groups,
        videos=videos,
        failed=failed,
        seconds=time.monotonic() - began,
    )


def _score(listed: VideoList, config: VideosConfig, out: Storage, progress: Listener) -> ScoringOutcome:
    scoring = config.scoring
    present = out.list_files(scoring.mode)
    tasks = [_task(video, scoring.mode, scoring.dimensions) for video in listed.videos if video.stamp]
    items = [Item(task.name, task) for task in tasks if f"{task.folder}/{task.last_file}" not in present]
    missing = {video.name: video.problem for video in listed.videos if not video.stamp}
    if not items:
        return ScoringOutcome(0, missing)
    _check_that_networks_load(scoring)
    with ray_session(config.engine):
        began = time.monotonic()
        progress(StageBegan("scoring", len(items)))
        make = partial(VbenchWork, out, listed.storage, scoring)
        count = min(len(items), worker_count(scoring, config.engine, progress))
        outcome = collect(FanOut(items, make, each_worker(scoring, count), keep=True), len(items), progress)
        progress(StageEnded("scoring", time.monotonic() - began))
    return replace(outcome, failures=missing | outcome.failures)


def _check_that_networks_load(scoring: ScoringSection) -> None:
    """WeightsError for a file that is damaged or another one: told once, not by every worker for every video."""
    if scoring.weights == RANDOM:
        return
    networks = Networks(WeightFiles(Path(scoring.weights) if scoring.weights else None))
    for dimension in scoring.dimensions:
        for name in (*IN_CLIP_NETWORKS[dimension], *SLOW_NETWORKS.get(dimension, ())):
            networks.build(name)


def _identity(video: ListedVideo) -> str:
    return f"{video.name}@{video.stamp}"


def _task(video: ListedVideo, mode: str, dimensions: Sequence[DimensionName]) -> VbenchTask:
    identity = _identity(video)
    # The longest duration is the whole file.
    prefixes = video.durations_s[:-1]
    return VbenchTask(
        path=video.path,
        name=video.name,
        sha256=None,
        video=identity,
        folder=f"{mode}/{hashlib.sha256(identity.encode()).hexdigest()[:20]}",
        last_file=last_file(identity, prefixes, dimensions),
        durations_s=prefixes,
    )


def _results(
    videos: Sequence[ListedVideo],
    rows: Mapping[str, Sequence[ScoreRow]],
    dimensions: Sequence[DimensionName],
    failures: Mapping[str, str],
) -> tuple[list[GroupResult], list[VideoResult]]:
    grouped: dict[tuple[str, float | None, str], list[ListedVideo]] = {}
    for video in videos:
        for duration_s in video.durations_s or (None,):
            grouped.setdefault((video.labels.backbone, duration_s, video.labels.method), []).append(video)
    groups, results, scored = [], [], []
    for (backbone, duration_s, method), members in grouped.items():
        found = _aggregated(members, duration_s, rows, dimensions)
        spans = Counter(video for video, _ in {(clip.video, clip.span) for clip in found.clips})
        reasons: dict[str, dict[str, str]] = {}
        for gone in found.unscored:
            reasons.setdefault(gone.video, {})[gone.dimension] = gone.reason
        made = [
            VideoResult(
                path=video.name,
                method=method,
                backbone=backbone,
                prompt=video.labels.prompt,
                sample=video.labels.sample,
                duration_s=duration_s,
                clips=spans[_identity(video)],
                scores=_unit(found.per_video.get(_identity(video), {})),
                reason=_reason(reasons.get(_identity(video), {}), failures.get(video.name)),
            )
            for video in members
        ]
        results += made
        ready = [result for result in made if result.scores]
        clips = sum(result.clips for result in ready)
        means = (found.mean_over_clips, found.mean_of_video_means)
        groups.append(GroupResult(backbone, duration_s, method, len(ready), clips, *means, None, 0))
        scored += ready
    return _ranked(groups, scored, dimensions), results


def _aggregated(
    videos: Iterable[ListedVideo],
    duration_s: float | None,
    rows: Mapping[str, Sequence[ScoreRow]],
    dimensions: Sequence[DimensionName],
) -> Aggregate:
    frames, own = {}, []
    for video in videos:
        identity = _identity(video)
        found = [row for row in rows.get(identity, ()) if row.dimension in dimensions or row.kind == "failure"]
        own += found
        prefix = duration_s if duration_s in video.durations_s[:-1] else None
        # 0 stands for as far as the clips go.
        frames[identity] = prefix_frames(prefix, found[0].fps) if prefix and found else 0
    return aggregate(own, frames)


def _unit(scores: Mapping[str, float]) -> dict[str, float]:
    """All dimensions on 0..1."""
    return {name: value / 100 if name == "imaging_quality" else value for name, value in scores.items()}


def _reason(missing: Mapping[str, str], failure: str | None) -> str:
    """Why a video misses these dimensions; '' stands for all of them."""
    if "" in missing:
        # What happened in this start says more than that there are no rows.
        return failure or missing[""]
    return "; ".join(f"{name}: {reason}" for name, reason in missing.items())


def _ranked(
    groups: Sequence[GroupResult], videos: Sequence[VideoResult], dimensions: Sequence[DimensionName]
) -> list[GroupResult]:
    """Average ranks where the manifest names methods and prompts."""
    measures = vbench_long("direct", dimensions).measures
    methods = list(dict.fromkeys(group.method for group in groups))
    if len(methods) < 2 or not all(video.prompt for video in videos):
        return list(groups)
    # The table of ranks knows durations as whole numbers.
    scored = [
        VideoScore(v.backbone, v.method, _milliseconds(v.duration_s), v.prompt, v.sample, v.scores, v.clips)
        for v in videos
    ]
    blocks = {(b.backbone, b.latent_frames): b for b in average_ranks(scored, methods, measures, "clips")}
    ranked = []
    for group in groups:
        block = blocks.get((group.backbone, _milliseconds(group.duration_s)))
        row = next((row for row in block.rows if row.method == group.method), None) if block else None
        rank = row.average_rank if row else None
        ranked.append(replace(group, average_rank=rank, prompts_ranked=block.prompts if block else 0))
    return ranked


def _milliseconds(duration_s: float | None) -> int:
    return round((duration_s or 0) * 1000)


def _csv(videos: Sequence[VideoResult], dimensions: Sequence[DimensionName]) -> str:
    labels = ("path", "method", "backbone", "prompt", "sample", "duration_s", "clips")
    names = [name for name in DIMENSION_NAMES if name in dimensions]
    rows = (
        {label: getattr(video, label) for label in (*labels, "reason")}
        | {name: video.scores[name] for name in names if name in video.scores}
        for video in videos
    )
    return csv_text([*labels, *names, "reason"], rows)

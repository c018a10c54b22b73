"""Score videos outside a run: everything that `lrag-ray score FOLDER` does is `score_videos`.

::

    TO/<mode>/…              scores, see the suite (lrag_ray.scoring.vbench_long.videos)
    TO/videos-<mode>.csv     one line per video and duration, written again
    TO/failures/…            why videos could not be scored
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lrag_ray.config.paths import with_absolute_weights
from lrag_ray.config.schema import EngineSection, ScoringSection
from lrag_ray.config.videos import VideosConfig
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import ConfigError
from lrag_ray.events import Listener, silent
from lrag_ray.pipelines.job import Job
from lrag_ray.pipelines.scoring import as_tasks, score_tasks, scoring_stage
from lrag_ray.pipelines.video_list import ListedVideo, VideoList, list_videos
from lrag_ray.report.csv_text import csv_text
from lrag_ray.report.tables import comparison_note
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import VideoScore, average_ranks
from lrag_ray.scoring.registry import suite_of
from lrag_ray.scoring.suite import LooseVideo, LooseVideoSuite, VideoReader
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
    note: str = ""
    """What a person should know of it."""


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

    @property
    def name(self) -> str:
        """Backbone and duration as people read them."""
        names = [self.backbone, "" if self.duration_s is None else f"{self.duration_s:g} s"]
        return ", ".join(filter(None, names)) or "all videos"


@dataclass(frozen=True)
class VideoScores:
    """How scoring videos ended."""

    exit_code: int
    """0 all done, 1 some videos have no score or miss a dimension, 130 interrupted."""
    to: str
    mode: str
    csv: str
    """Name of the table in `to`."""
    dimensions: Sequence[str]
    untrained: bool
    """The networks had random weights: the numbers mean nothing."""
    videos_scored: int
    """By this start."""
    groups: Sequence[GroupResult]
    videos: Sequence[VideoResult]
    failed: Mapping[str, str]
    """Reason by path."""
    left_out: Sequence[str]
    """What the ranks are over, and what is left out of them."""
    seconds: float


def score_videos(
    target: str,
    config: VideosConfig,
    *,
    manifest: str | None = None,
    to: str | None = None,
    listener: Listener = silent,
) -> VideoScores:
    """Score the videos at `target` (folder, file, glob, or address of a bucket) into the folder or address `to`.

    The same call continues: rows are stored as soon as a few clips are done. Raises UsageError for a target or manifest
    that cannot be used; ConfigError for a suite that scores runs only; WeightsError; StorageError; ClusterError.
    """
    scoring = with_absolute_weights(config.scoring)
    suite = suite_of(scoring)
    if not isinstance(suite, LooseVideoSuite):
        raise ConfigError(
            f"scoring.suite is {scoring.suite}, which does not score videos outside a run: use vbench_long"
        )
    suite.check_weights()
    listed = list_videos(target, manifest, config.storage)
    out = Storage(to or f"scores-{suite.name}", config.storage)
    out.probe()
    suite.check_videos(out)
    return ScoreVideosJob(scoring, config.engine, suite, listed, out, listener).start()


class ScoreVideosJob(Job[VideoScores]):
    """One start of scoring videos outside a run."""

    command = "score"

    def __init__(
        self,
        scoring: ScoringSection,
        engine: EngineSection,
        suite: LooseVideoSuite[Any],
        listed: VideoList,
        out: Storage,
        listener: Listener,
    ) -> None:
        super().__init__(out, engine, listener)
        self._scoring = scoring
        self._suite = suite
        self._listed = listed
        for note in listed.notes:
            self.warn(note)

    @property
    def kinds(self) -> Sequence[str]:
        """The scores of its suite."""
        return [self._suite.folder]

    def do(self) -> None:
        """Score what is pending."""
        scoring, listed = self._scoring, self._listed
        self.missing |= {video.name: video.problem for video in listed.videos if not video.stamp}
        videos = [loose(video) for video in listed.videos if video.stamp]
        tasks = as_tasks(self._suite.pending_videos(videos, self.storage))
        if not tasks:
            return
        # A file that is damaged or a different one is reported once, not by every worker for every video.
        loaded: set[str] = set()
        for file in self._suite.weight_files():
            if file.needed and file.name not in loaded:
                loaded |= set(self._suite.check_loads(file.name))
        stage = scoring_stage(self._suite, self.storage, listed.storage, scoring)
        with ray_session(self.engine), self.stage("scoring", len(tasks)):
            score_tasks(stage, tasks, scoring, self.engine, self.report)

    def outcome(self, exit_code: int) -> VideoScores:
        """What is stored, of this start and earlier ones."""
        suite, listed = self._suite, self._listed.videos
        reader = suite.read_videos(self.storage)
        groups, videos, left_out = _results(listed, reader, suite.measures, self.missing)
        name = f"videos{f'-{suite.mode}' if suite.mode else ''}.csv"
        self.storage.write(name, _csv(videos, suite.measures).encode())
        failed = {v.path + (f" at {v.duration_s:g} s" if v.duration_s else ""): v.reason for v in videos if v.reason}
        return VideoScores(
            # A video may also be missing some measures, or be missing since an earlier start.
            exit_code=exit_code or int(bool(failed)),
            to=self.storage.uri,
            mode=suite.mode,
            csv=name,
            dimensions=[measure.name for measure in suite.measures],
            untrained=reader.untrained([loose(video) for video in listed]),
            videos_scored=self.made["scoring"],
            groups=groups,
            videos=videos,
            failed=failed,
            left_out=left_out,
            seconds=self.seconds,
        )


def loose(video: ListedVideo) -> LooseVideo:
    """A listed video as suites know it."""
    return LooseVideo(video.path, video.name, f"{video.name}@{video.stamp}", video.durations_s)


def _results(
    videos: Sequence[ListedVideo],
    reader: VideoReader,
    measures: Sequence[Measure],
    failures: Mapping[str, str],
) -> tuple[list[GroupResult], list[VideoResult], list[str]]:
    grouped: dict[tuple[str, float | None, str], list[ListedVideo]] = {}
    for video in videos:
        for duration_s in video.durations_s or (None,):
            grouped.setdefault((video.labels.backbone, duration_s, video.labels.method), []).append(video)
    groups, results, scored = [], [], []
    for (backbone, duration_s, method), members in grouped.items():
        own = {video.name: loose(video) for video in members}
        found = reader.at(list(own.values()), duration_s)
        made = [
            VideoResult(
                path=video.name,
                method=method,
                backbone=backbone,
                prompt=video.labels.prompt,
                sample=video.labels.sample,
                duration_s=duration_s,
                clips=found.clips.get(own[video.name].identity, 0),
                scores=found.per_video.get(own[video.name].identity, {}),
                reason=_reason(found.missing.get(own[video.name].identity, {}), failures.get(video.name)),
                note=found.notes.get(own[video.name].identity, ""),
            )
            for video in members
        ]
        results += made
        ready = [result for result in made if result.scores]
        clips = sum(result.clips for result in ready)
        means = (found.mean_over_clips, found.mean_of_video_means)
        groups.append(GroupResult(backbone, duration_s, method, len(ready), clips, *means, None, 0))
        scored += ready
    scored_measures = [measure for measure in measures if any(measure.name in video.scores for video in scored)]
    ranked, notes = _ranked(groups, scored, scored_measures)
    if notes and (none := [measure.title for measure in measures if measure not in scored_measures]):
        notes.append(f"Left out of the ranks, because no video has it: {', '.join(none)}.")
    return ranked, results, notes


def _reason(missing: Mapping[str, str], failure: str | None) -> str:
    """Why a video misses these dimensions; '' stands for all of them."""
    if "" in missing:
        # What happened in this start says more than that there are no rows.
        return failure or missing[""]
    return "; ".join(f"{name}: {reason}" for name, reason in missing.items())


def _ranked(
    groups: Sequence[GroupResult], videos: Sequence[VideoResult], measures: Sequence[Measure]
) -> tuple[list[GroupResult], list[str]]:
    """Average ranks where the manifest names methods and prompts, and what each table of ranks is over."""
    methods = list(dict.fromkeys(group.method for group in groups))
    if len(methods) < 2 or not all(video.prompt for video in videos):
        return list(groups), []
    # The table of ranks knows durations as whole numbers.
    scored = [
        VideoScore(v.backbone, v.method, _milliseconds(v.duration_s), v.prompt, v.sample, v.scores, v.clips)
        for v in videos
    ]
    blocks = {(b.backbone, b.latent_frames): b for b in average_ranks(scored, methods, measures, "clips")}
    ranked, notes = [], {}
    for group in groups:
        block = blocks.get((group.backbone, _milliseconds(group.duration_s)))
        row = next((row for row in block.rows if row.method == group.method), None) if block else None
        rank = row.average_rank if row else None
        ranked.append(replace(group, average_rank=rank, prompts_ranked=block.prompts if block else 0))
        if block:
            notes[group.name] = comparison_note(block)
    return ranked, [f"{name}: {note}" for name, note in notes.items()]


def _milliseconds(duration_s: float | None) -> int:
    return round((duration_s or 0) * 1000)


def _csv(videos: Sequence[VideoResult], measures: Sequence[Measure]) -> str:
    labels = ("path", "method", "backbone", "prompt", "sample", "duration_s", "clips")
    names = [measure.name for measure in measures]
    rows = (
        {label: getattr(video, label) for label in (*labels, "reason", "note")}
        | {name: video.scores[name] for name in names if name in video.scores}
        for video in videos
    )
    return csv_text([*labels, *names, "reason", "note"], rows)

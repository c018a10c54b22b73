"""Base of suites that score every video at every duration by itself and store one row for each, in a file of its own.

A suite of this kind says what its measures are and how one video is scored::

    class Judge(PerVideoSuite[NoSettings]):
        name = "judge"
        measures = (Measure("taste", "Taste", "What the judge says", lower=0, upper=10, higher_is_better=True),)

        def scorer(self, *, threads: int, device: str) -> VideoScorer:
            judge = load_judge(device)
            return lambda video, target: {"taste": judge.rate(frames_of(video, target.video_frames))}
"""

from __future__ import annotations

import platform
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa

from lrag_ray.scoring.ranks import VideoScore
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import KeepGoing, ScoringTask, SettingsT, Suite, UnscorableError
from lrag_ray.scoring.video_rows import ScoreTarget, VideoRow, from_parquet, to_parquet, to_table
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import local_copy
from lrag_ray.store.records import RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.videos import CommittedVideo, committed_videos
from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import VideoError, iterate_frames

VideoScorer = Callable[[Path, ScoreTarget], Mapping[str, float]]
"""Values by measure name of the first ``target.video_frames`` frames of a local file.

Raises VideoError or UnscorableError for a video that has no score; the reason is stored instead.
"""


class PerVideoSuite(Suite[SettingsT]):
    """Scores each video by itself."""

    @abstractmethod
    def scorer(self, *, threads: int, device: str) -> VideoScorer:
        """Load what is needed, once per process."""

    def pending_targets(self, run: RolloutRun) -> list[ScoreTarget]:
        """Videos at their durations that are committed and not scored, in prompt-major order."""
        scored = run.storage.list_files(self.folder)
        targets = map(score_target, committed_videos(run))
        return [target for target in targets if target.score_path(self) not in scored]

    def pending(self, run: RolloutRun, *, settled: bool = False) -> list[ScoringTask]:
        """`pending_targets` as tasks."""
        return [
            ScoringTask(f"{target.rollout_path} at {target.latent_frames} latent frames", target)
            for target in self.pending_targets(run)
        ]

    def worker(self, rows: Storage, videos: Storage | None, *, threads: int, device: str) -> PerVideoWorker:
        """Set up in a worker's process."""
        if videos is None:
            raise ValueError(f"suite {self.name} scores videos of runs only")
        return PerVideoWorker(self, rows, videos, self.scorer(threads=threads, device=device))

    def read(self, scores: Scores, run: RolloutRun, videos: Mapping[RolloutId, Sequence[CommittedVideo]]) -> None:
        """Add rows in the order of `videos`; rows of videos that were since replaced are left out."""
        targets = [score_target(video) for group in videos.values() for video in group]
        order = {(t.rollout_path, t.latent_frames, t.video_sha256): i for i, t in enumerate(targets)}
        found = {}
        paths = [path for path in run.storage.list_files(self.folder) if path.endswith(".parquet")]
        for path, data in run.storage.read_many(paths).items():
            try:
                rows = from_parquet(data, self)
            except pa.ArrowException:
                scores.damaged.append(path)
                continue
            for row in rows:
                position = order.get((row.target.rollout_path, row.target.latent_frames, row.target.video_sha256))
                if position is not None:
                    # What else a row says of its video is its writer's word, and the run knows better.
                    found[position] = replace(row, target=targets[position])
        scores.pending += len(order) - len(found)
        for _, row in sorted(found.items()):
            target = row.target
            scores.rows.append(row)
            scores.computed[row.versions] += 1
            if row.reason is not None:
                scores.failures[target.video_path] = row.reason
                continue
            scores.videos.append(
                VideoScore(
                    target.backbone, target.method, target.latent_frames, target.prompt_id, target.sample, row.values
                )
            )

    def table(self, scores: Scores) -> pa.Table:
        """The stored rows."""
        return to_table(scores.rows, self)


class PerVideoWorker:
    """Scores one target and stores its row."""

    def __init__(self, suite: PerVideoSuite[SettingsT], rows: Storage, videos: Storage, scorer: VideoScorer) -> None:
        self._suite, self._rows, self._videos, self._scorer = suite, rows, videos, scorer

    def score(self, payload: ScoreTarget, keep_going: KeepGoing) -> None:
        """A video that cannot be scored is stored as such and then refused; a damaged file only fails the attempt."""
        row = self.row(payload)
        path = payload.score_path(self._suite)
        self._rows.create(path, to_parquet([row], self._suite, path))
        if row.reason:
            raise UnscorableError(row.reason)

    def row(self, target: ScoreTarget) -> VideoRow:
        """Score one video; one that has no score becomes a row with the reason. DamagedVideoError for another file."""
        import torch

        values: Mapping[str, float] = {}
        reason = None
        with scratch_folder() as scratch:
            video = local_copy(self._videos, target.video_path, target.video_sha256, scratch)
            try:
                values = self._scorer(video, target)
            except (VideoError, UnscorableError) as error:
                # The place on this machine means nothing to who reads the row.
                reason = str(error).replace(f"{scratch}/", "").replace(f"{self._videos.root}/", "")
        suite = self._suite
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {suite.name} {suite.version}"
        return VideoRow(target, values, reason, versions, now_utc())


def score_target(video: CommittedVideo) -> ScoreTarget:
    """What has to be scored for a committed video."""
    return ScoreTarget(
        rollout_path=video.rollout.path,
        backbone=video.rollout.backbone,
        method=video.rollout.method,
        prompt_id=video.rollout.prompt_id,
        sample=video.rollout.sample,
        latent_frames=video.latent_frames,
        video_path=video.video.path,
        video_sha256=video.video.sha256,
        video_frames=video.frames,
        fps=video.fps,
        frames_per_block=video.frames_per_block,
        cold_chunk=video.cold_chunk,
    )


def frames_of(video: Path, count: int) -> Iterator[Frames]:
    """The first `count` frames; VideoError if there are fewer."""
    found = 0
    for frame in islice(iterate_frames(video), count):
        yield frame
        found += 1
    if found < count:
        raise VideoError(f"{video} has {found} frames, its commit speaks of {count}")

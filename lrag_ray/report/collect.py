"""Everything a report shows, read once from storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyarrow import ArrowException

from lrag_ray.context.trace import TraceRow
from lrag_ray.scoring.ranks import RankBlock, VideoScore, average_ranks
from lrag_ray.scoring.table import ScoreRow, Suite, from_parquet
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.parts import read_trace
from lrag_ray.store.records import RolloutId
from lrag_ray.store.run_dir import RunDirectory
from lrag_ray.store.status import RunStatus, run_status
from lrag_ray.store.videos import CommittedVideo, committed_videos


@dataclass(frozen=True)
class ReportData:
    """A run, its scores and its ranks."""

    uri: str
    identity: RunIdentity
    status: RunStatus
    suite: Suite
    scores: Sequence[ScoreRow]
    """In prompt-major order."""
    blocks: Sequence[RankBlock]
    """One per backbone and duration."""
    videos: Mapping[RolloutId, Sequence[CommittedVideo]]
    """By rollout, shortest duration first."""
    traces: Mapping[RolloutId, Sequence[TraceRow]]
    """Trace of the longest committed duration."""

    def duration_s(self, backbone: str, latent_frames: int) -> float:
        """The duration as the configuration names it."""
        horizons = self.identity.backbones[backbone].horizons
        return next(horizon.duration_s for horizon in horizons if horizon.latent_frames == latent_frames)

    @property
    def labels(self) -> list[str]:
        """What must be said of the backbones on every table and page, e.g. ``tiny, untrained``."""
        return list(dict.fromkeys(backbone.label for backbone in self.identity.backbones.values() if backbone.label))

    @property
    def nested(self) -> bool:
        """Whether any method's shorter durations are prefixes of its longest rollout."""
        several = any(len(backbone.horizons) > 1 for backbone in self.identity.backbones.values())
        return several and any(method.nested for method in self.identity.methods.values())

    @property
    def device_kinds(self) -> Mapping[str, int]:
        """Number of rollouts per kind of device."""
        return Counter(videos[-1].commit.device_kind for videos in self.videos.values())

    @property
    def scoring_failures(self) -> Sequence[ScoreRow]:
        """Videos that could not be scored."""
        return [row for row in self.scores if row.reason is not None]


def collect(run_dir: RunDirectory, suite: Suite) -> ReportData:
    """Read a run. Raises StorageError where there is none."""
    identity = run_dir.require()
    videos: dict[RolloutId, list[CommittedVideo]] = {}
    for video in committed_videos(run_dir):
        videos.setdefault(video.rollout, []).append(video)
    scores = _scores(run_dir, suite, videos)
    ranked = [
        VideoScore(t.backbone, t.method, t.latent_frames, t.prompt_id, t.sample, row.values)
        for row in scores
        if row.reason is None
        for t in (row.target,)
    ]
    return ReportData(
        uri=run_dir.uri,
        identity=identity,
        status=run_status(run_dir),
        suite=suite,
        scores=scores,
        blocks=average_ranks(ranked, list(identity.methods), suite.measures),
        videos=videos,
        traces=_traces(run_dir, videos),
    )


def _scores(
    run_dir: RunDirectory, suite: Suite, videos: Mapping[RolloutId, Sequence[CommittedVideo]]
) -> list[ScoreRow]:
    """Rows of the videos that count now, in their order; rows of videos that were since replaced are left out."""
    order = {
        (video.rollout.path, video.latent_frames, video.video.sha256): i
        for i, video in enumerate(video for group in videos.values() for video in group)
    }
    found = {}
    for data in run_dir.storage.read_many(list(run_dir.storage.list_files(suite.folder))).values():
        try:
            rows = from_parquet(data, suite)
        except ArrowException:
            # A file that is no score is missing from the table, where the counts show it.
            continue
        for row in rows:
            position = order.get((row.target.rollout_path, row.target.latent_frames, row.target.video_sha256))
            if position is not None:
                found[position] = row
    return [row for _, row in sorted(found.items())]


def _traces(
    run_dir: RunDirectory, videos: Mapping[RolloutId, Sequence[CommittedVideo]]
) -> dict[RolloutId, list[TraceRow]]:
    paths = {rollout: [part.path for part in group[-1].commit.trace_parts] for rollout, group in videos.items()}
    contents = run_dir.storage.read_many([path for group in paths.values() for path in group])
    return {
        rollout: [row for path in group for row in read_trace(contents[path])]
        for rollout, group in paths.items()
        if all(path in contents for path in group)
    }

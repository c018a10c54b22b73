"""VBench-Long of videos outside a run: what is open, and what is stored.

::

    <mode>/<identity of the video, hashed>/rows-<token>.parquet    see lrag_ray.scoring.vbench_long.parquet
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from lrag_ray.scoring.suite import LooseVideo, ScoringTask, VideoSetScores
from lrag_ray.scoring.vbench_long.aggregate import aggregate
from lrag_ray.scoring.vbench_long.dimensions import as_shares
from lrag_ray.scoring.vbench_long.parquet import is_untrained
from lrag_ray.scoring.vbench_long.pending import last_file
from lrag_ray.scoring.vbench_long.rows import ScoreRow
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.worker import VbenchTask, prefix_frames, stored_rows
from lrag_ray.store.address import Storage


def pending_videos(videos: Sequence[LooseVideo], rows: Storage, settings: VbenchSettings) -> list[ScoringTask]:
    """Tasks of the videos that are not fully scored."""
    present = rows.list_files(settings.mode)
    tasks = [_task(video, settings) for video in videos]
    return [ScoringTask(task.name, task) for task in tasks if f"{task.folder}/{task.last_file}" not in present]


def _task(video: LooseVideo, settings: VbenchSettings) -> VbenchTask:
    # The longest duration is the whole file.
    prefixes = video.durations_s[:-1]
    return VbenchTask(
        path=video.path,
        name=video.name,
        sha256=None,
        video=video.identity,
        folder=f"{settings.mode}/{hashlib.sha256(video.identity.encode()).hexdigest()[:20]}",
        last_file=last_file(video.identity, prefixes, settings.dimensions),
        durations_s=prefixes,
    )


class StoredVideos:
    """All rows of a mode, by video."""

    def __init__(self, rows: Storage, settings: VbenchSettings) -> None:
        self._dimensions = settings.dimensions
        self._rows: dict[str, list[ScoreRow]] = {}
        for row in stored_rows(rows, settings.mode):
            self._rows.setdefault(row.video, []).append(row)

    def untrained(self, videos: Sequence[LooseVideo]) -> bool:
        """Whether networks with random weights are behind any of them."""
        return any(is_untrained(row) for video in videos for row in self._rows.get(video.identity, ()))

    def at(self, videos: Sequence[LooseVideo], duration_s: float | None) -> VideoSetScores:
        """Aggregate the videos at one duration."""
        frames, own = {}, []
        for video in videos:
            stored = self._rows.get(video.identity, ())
            found = [row for row in stored if row.dimension in self._dimensions or row.kind == "failure"]
            own += found
            prefix = duration_s if duration_s in video.durations_s[:-1] else None
            # 0 stands for as far as the clips go.
            frames[video.identity] = prefix_frames(prefix, found[0].fps) if prefix and found else 0
        made = aggregate(own, frames)
        missing: dict[str, dict[str, str]] = {}
        for gone in made.unscored:
            missing.setdefault(gone.video, {})[gone.dimension] = gone.reason
        return VideoSetScores(
            per_video={video: as_shares(values) for video, values in made.per_video.items()},
            clips=Counter(video for video, _ in {(clip.video, clip.span) for clip in made.clips}),
            mean_over_clips=made.mean_over_clips,
            mean_of_video_means=made.mean_of_video_means,
            missing=missing,
            notes={
                video.identity: row.reason
                for video in videos
                for row in self._rows.get(video.identity, ())
                if row.kind == "note"
            },
        )

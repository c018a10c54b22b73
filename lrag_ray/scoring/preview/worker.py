"""The preview suite over a run: one row per video and duration, each in a file of its own."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lrag_ray.engine.fan_out import GoOn, Item, Refused
from lrag_ray.scoring.preview.measures import PREVIEW, measures
from lrag_ray.scoring.table import ScoreRow, ScoreTarget, to_parquet
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import local_copy
from lrag_ray.store.records import now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.videos import CommittedVideo, committed_videos
from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import VideoError, iterate_frames


def pending_targets(run_dir: RolloutRun) -> list[ScoreTarget]:
    """Videos at their durations that are committed and not scored, in prompt-major order."""
    scored = run_dir.storage.list_files(PREVIEW.folder)
    targets = map(score_target, committed_videos(run_dir))
    return [target for target in targets if target.score_path(PREVIEW) not in scored]


def pending_items(run_dir: RolloutRun) -> list[Item]:
    """`pending_targets` for a fan-out."""
    return [Item(f"{t.rollout_path} at {t.latent_frames} latent frames", t) for t in pending_targets(run_dir)]


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
    )


class PreviewWork:
    """Scores one target and commits its row."""

    def __init__(self, storage: Storage) -> None:
        import torch

        torch.set_num_threads(1)
        self._storage = storage

    def __call__(self, target: ScoreTarget, go_on: GoOn) -> None:
        """A broken video is recorded as such and then refused."""
        row = score_video(self._storage, target)
        self._storage.create(target.score_path(PREVIEW), to_parquet([row], PREVIEW))
        if row.reason:
            raise Refused(row.reason)


def score_video(storage: Storage, target: ScoreTarget) -> ScoreRow:
    """Decode one video once and measure it; a video that cannot be read becomes a row with the reason."""
    import torch

    values: dict[str, float] = {}
    reason = None
    with scratch_folder() as scratch:
        try:
            video = local_copy(storage, target.video_path, target.video_sha256, scratch)
            values = measures(_frames_of(video, target.video_frames), target.fps)
        except VideoError as error:
            # The place on this machine means nothing to who reads the row.
            reason = str(error).replace(f"{scratch}/", "").replace(f"{storage.root}/", "")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {PREVIEW.name} {PREVIEW.version}"
    return ScoreRow(target, values, reason, versions, now_utc())


def _frames_of(video: Path, count: int) -> Iterator[Frames]:
    """The first `count` frames; VideoError if there are fewer."""
    found = 0
    for frame in islice(iterate_frames(video), count):
        yield frame
        found += 1
    if found < count:
        raise VideoError(f"{video} has {found} frames, its commit speaks of {count}")

"""Scoring of a run's videos: a Ray Data fan-out over what is committed and not yet scored.

`score_pending` does one wave. It may be called while generation goes on (from a thread of the driver: it returns when
its wave is done) and is called once more at the end. What is pending comes from storage alone, by the names of the
score files; a worker commits its row itself, create-only, as soon as it has it, so a killed wave loses nothing.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import StorageError
from lrag_ray.scoring.preview import PREVIEW, measures
from lrag_ray.scoring.table import ScoreRow, ScoreTarget, Suite, to_parquet
from lrag_ray.store.address import Storage
from lrag_ray.store.records import now_utc
from lrag_ray.store.run_dir import RunDirectory
from lrag_ray.store.videos import CommittedVideo, committed_videos
from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import VideoError, iterate_frames

Progress = Callable[[int, int], None]
"""Called with (videos done, videos of this wave)."""

_RETRIES = 2
_WORKER_DIED = "the worker that scored it died; it is tried again in the next wave"


@dataclass(frozen=True)
class ScoringOutcome:
    """What one wave did."""

    scored: int
    """Videos that got values."""
    failures: dict[str, str]
    """Reason by video path, for broken videos (recorded) and storage trouble (tried again in the next wave)."""


def score_pending(run_dir: RunDirectory, config: RunConfig, progress: Progress | None = None) -> ScoringOutcome:
    """Score every committed video that has no score yet. Needs a running Ray; starts nothing without work.

    Raises:
        StorageError: the run cannot be listed. Trouble with a single video is in the outcome instead.
    """
    if config.scoring.suite == "none":
        return ScoringOutcome(0, {})
    targets = pending_targets(run_dir, PREVIEW)
    if not targets:
        return ScoringOutcome(0, {})
    items = [asdict(target) | {"uri": run_dir.storage.address} for target in targets]
    reasons = {target.score_path(PREVIEW): _WORKER_DIED for target in targets}
    for done, row in enumerate(_fan_out(items, _score_in_worker, config.scoring.cpus_per_worker), start=1):
        reasons[row["score_path"]] = row["reason"]
        if progress is not None:
            progress(done, len(targets))
    failures = {t.video_path: reason for t in targets if (reason := reasons[t.score_path(PREVIEW)])}
    return ScoringOutcome(sum(not reason for reason in reasons.values()), failures)


def pending_targets(run_dir: RunDirectory, suite: Suite) -> list[ScoreTarget]:
    """Videos at their durations that are committed and not scored, in prompt-major order."""
    scored = run_dir.storage.list_files(suite.folder)
    targets = map(score_target, committed_videos(run_dir))
    return [target for target in targets if target.score_path(suite) not in scored]


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


def _fan_out(
    items: list[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, str]], cpus_per_worker: float
) -> Iterator[dict[str, str]]:
    """Results of `work` in order of completion; one item per task, so that none waits behind another.

    An item whose worker dies again and again has no result; Ray Data by itself would retry it for ever.
    """
    import ray
    from ray.util.annotations import RayDeprecationWarning

    with _quiet_ray_data():
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        with warnings.catch_warnings():
            # Ray 2.60 deprecates this way to set max_retries and has no other; see again before Ray 2.64.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            scored = dataset.map(work, num_cpus=cpus_per_worker, max_retries=_RETRIES)
        yield from scored.iter_rows()


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without a display of its own (the run has one), and going on after a lost item."""
    import ray.data

    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.max_errored_blocks, logger.level
    context.enable_progress_bars, context.max_errored_blocks = False, -1
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.max_errored_blocks, level = before
        logger.setLevel(level)


def _score_in_worker(item: dict[str, Any]) -> dict[str, str]:
    """Score one video and commit its row; returns the row's path and the reason of a failure, or ''."""
    import torch

    torch.set_num_threads(1)
    item = dict(item)
    storage = Storage(item.pop("uri"))
    target = ScoreTarget(**item)
    score_path = target.score_path(PREVIEW)
    try:
        row = score_video(storage, target)
        storage.create(score_path, to_parquet([row], PREVIEW))
    except StorageError as error:
        return {"score_path": score_path, "reason": str(error)}
    return {"score_path": score_path, "reason": row.reason or ""}


def score_video(storage: Storage, target: ScoreTarget) -> ScoreRow:
    """Decode one video once and measure it; a video that cannot be read becomes a row with the reason."""
    import torch

    values: dict[str, float] = {}
    reason = None
    with tempfile.TemporaryDirectory(prefix="lrag-score-") as scratch:
        try:
            video = _local_copy(storage, target, Path(scratch))
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


def _local_copy(storage: Storage, target: ScoreTarget, scratch: Path) -> Path:
    """The video as a local file with the committed bytes; VideoError where they are others."""
    if storage.is_local:
        local = Path(storage.full(target.video_path))
        if not local.is_file():
            raise VideoError(f"{target.video_path} is missing")
    else:
        local = scratch / "video.mp4"
        try:
            storage.get_file(target.video_path, local)
        except FileNotFoundError:
            raise VideoError(f"{target.video_path} is missing") from None
    with local.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != target.video_sha256:
        raise VideoError(f"{target.video_path} does not have the checksum of its commit")
    return local

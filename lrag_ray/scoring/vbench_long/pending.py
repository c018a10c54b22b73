"""VBench-Long over a run: one item per rollout, whose longest video serves all its durations."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lrag_ray.errors import ConfigError
from lrag_ray.scoring.suite import ScoringTask
from lrag_ray.scoring.vbench_long.clips import ClipSpan, clip_length, spans
from lrag_ray.scoring.vbench_long.dimensions import DIMENSIONS
from lrag_ray.scoring.vbench_long.names import DimensionName
from lrag_ray.scoring.vbench_long.parquet import (
    folder,
    frozen_folder,
    frozen_identity,
    is_untrained,
    rollout_folder,
    video_identity,
)
from lrag_ray.scoring.vbench_long.rows import RowKey
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.worker import VbenchTask, read_row_files
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo, committed_videos


@dataclass(frozen=True)
class WantedVideo:
    """All scores that are wanted of one file."""

    path: str
    sha256: str
    video: str
    durations: tuple[int, ...]
    fps: int
    folder: str
    dimensions: tuple[DimensionName, ...]
    nested: bool = True
    """Rows of another file of the same rollout serve a duration as well: its frames are the same."""
    frozen: bool = False

    @property
    def last_file(self) -> str:
        """A name that is there exactly if all of them were computed."""
        return last_file(self.video, self.durations, self.dimensions)

    def task(self, durations: Sequence[int]) -> VbenchTask:
        """What a worker does for these durations of it."""
        return VbenchTask(
            path=self.path,
            name=self.path,
            sha256=self.sha256,
            video=self.video,
            folder=self.folder,
            last_file=self.last_file,
            durations=tuple(durations),
            frozen=self.frozen,
            flow=not self.frozen,
        )


def last_file(video: str, durations: Iterable[float], dimensions: Iterable[DimensionName]) -> str:
    """Name of the row file that is there exactly if all that is wanted of a video was scored."""
    wanted = "\n".join([video, *map(str, durations), *sorted(dimensions)])
    return f"rows-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.parquet"


def refuse_mixture(storage: Storage, place: str, *, untrained: bool) -> None:
    """ConfigError where trained and untrained networks would end up in one table, the rows below the folder `place`."""
    for path in storage.list_files(place):
        rows = [row for rows in read_row_files(storage, [path]).values() for row in rows if row.networks]
        if rows:
            if is_untrained(rows[0]) != untrained:
                found = "random" if not untrained else "trained"
                raise ConfigError(
                    f"scoring.weights: {storage.uri}/{place} holds scores of {found} weights, which do not belong in "
                    "one table with these. Delete that folder, or score with the weights that it was made with"
                )
            return


def pending_tasks(run: RolloutRun, settings: VbenchSettings, *, settled: bool) -> list[ScoringTask]:
    """What is committed and not scored, in prompt-major order.

    With `settled` only rollouts whose every duration is committed: their files are the ones that will count.
    """
    identity = run.require()
    files = run.storage.list_files(folder(settings.mode))
    open_videos = [
        wanted
        for wanted in _wanted_videos(run, identity, settings, settled=settled)
        if f"{wanted.folder}/{wanted.last_file}" not in files
    ]
    begun = [path for path in files if path.rpartition("/")[0] in {wanted.folder for wanted in open_videos}]
    keys: dict[str, set[RowKey]] = {}
    for path, rows in read_row_files(run.storage, begun).items():
        keys.setdefault(path.rpartition("/")[0], set()).update(row.key for row in rows)
    tasks = []
    for wanted in open_videos:
        durations = [d for d in wanted.durations if not _is_scored(wanted, d, keys.get(wanted.folder, set()))]
        if durations:
            name = wanted.video.partition("@")[0] if wanted.nested else wanted.path
            tasks.append(ScoringTask(name, wanted.task(durations)))
    return tasks


def files_behind(run: RolloutRun, settings: VbenchSettings, damaged: Collection[str]) -> set[str]:
    """Files that say of a video that it is scored in full, where one of its files is among the `damaged`."""
    folders = {path.rpartition("/")[0] for path in damaged}
    videos = _wanted_videos(run, run.require(), settings, settled=False)
    ends = {f"{wanted.folder}/{wanted.last_file}" for wanted in videos if wanted.folder in folders}
    return ends & run.storage.list_files(folder(settings.mode)).keys()


def _wanted_videos(
    run: RolloutRun, identity: RunIdentity, settings: VbenchSettings, *, settled: bool
) -> Iterator[WantedVideo]:
    first_method = next(iter(identity.methods))
    groups: dict[str, list[CommittedVideo]] = {}
    for video in committed_videos(run):
        groups.setdefault(video.rollout.path, []).append(video)
    for videos in groups.values():
        rollout = videos[-1].rollout
        if settled and len(videos) < len({h.latent_frames for h in identity.backbones[rollout.backbone].horizons}):
            continue
        nested = identity.methods[rollout.method].nested
        # Independent durations are other rollouts: each file serves its own duration alone.
        for group in [videos] if nested else [[video] for video in videos]:
            file, fps = group[-1].video, group[-1].fps
            yield WantedVideo(
                path=file.path,
                sha256=file.sha256,
                video=video_identity(rollout.path, file.sha256),
                durations=tuple(sorted({video.frames for video in group})),
                fps=fps,
                folder=rollout_folder(settings.mode, rollout.path),
                dimensions=settings.dimensions,
                nested=nested,
            )
        if "frozen" in settings.controls and rollout.method == first_method:
            file, fps = videos[0].video, videos[0].fps
            yield WantedVideo(
                path=file.path,
                sha256=file.sha256,
                video=frozen_identity(rollout.backbone, rollout.prompt_id, rollout.sample),
                durations=(2 * clip_length(fps),),
                fps=fps,
                folder=frozen_folder(settings.mode, rollout.backbone, rollout.prompt_id, rollout.sample),
                dimensions=settings.dimensions,
                frozen=True,
            )


def _is_scored(wanted: WantedVideo, duration: int, keys: Collection[RowKey]) -> bool:
    """Whether the rows of one file say all that is wanted of a duration."""
    clips = spans(duration, clip_length(wanted.fps))
    if any(key.kind == "failure" and key.video == wanted.video for key in keys):
        return True
    videos = {key.video for key in keys} if wanted.nested else {wanted.video}
    flow = (key for key in keys if key.kind == "flow" and key.video == wanted.video)
    if not wanted.frozen and not any(key.frame_count >= duration for key in flow):
        # Other versions of the video may have been scored before there was such a row.
        videos.discard(wanted.video)
    return any(all(key in keys for key in _wanted_keys(video, wanted.dimensions, clips, duration)) for video in videos)


def _wanted_keys(
    video: str, dimensions: Sequence[DimensionName], clips: Sequence[ClipSpan], duration: int
) -> Iterator[RowKey]:
    for dimension in dimensions:
        yield from (RowKey(video, "clip", dimension, *span) for span in clips)
        if DIMENSIONS[dimension].slow and len(clips) > 1:
            yield RowKey(video, "clip_to_clip", dimension, 0, duration)

"""VBench-Long over a run: one item per rollout, whose longest video serves all its durations."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lrag_ray.config.schema import RunConfig, ScoringSection
from lrag_ray.engine.fan_out import Item
from lrag_ray.errors import ConfigError, WeightsError
from lrag_ray.scoring.vbench_long.clips import Span, clip_length, spans
from lrag_ray.scoring.vbench_long.parquet import (
    folder,
    frozen_folder,
    frozen_identity,
    is_untrained,
    rollout_folder,
    video_identity,
)
from lrag_ray.scoring.vbench_long.rows import Dimension, RowKey
from lrag_ray.scoring.vbench_long.score import IN_CLIP_NETWORKS, SLOW_NETWORKS
from lrag_ray.scoring.vbench_long.weights import WeightFiles
from lrag_ray.scoring.vbench_long.worker import RANDOM, VbenchTask, read_row_files
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo, committed_videos


@dataclass(frozen=True)
class Goal:
    """All that is wanted of one file."""

    path: str
    sha256: str
    video: str
    durations: tuple[int, ...]
    fps: int
    folder: str
    dimensions: tuple[Dimension, ...]
    nested: bool = True
    """Rows of another file of the same rollout serve a duration as well: its frames are the same."""
    frozen: bool = False

    @property
    def last_file(self) -> str:
        """A name that is there exactly if the goal was reached."""
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
        )


def last_file(video: str, durations: Iterable[float], dimensions: Iterable[Dimension]) -> str:
    """Name of the row file that is there exactly if all that is wanted of a video was scored."""
    wanted = "\n".join([video, *map(str, durations), *sorted(dimensions)])
    return f"rows-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.parquet"


def check_weights(scoring: ScoringSection) -> None:
    """WeightsError, with all that is missing, unless every network of the dimensions has its file here."""
    if scoring.weights == RANDOM:
        return
    files = WeightFiles(Path(scoring.weights) if scoring.weights else None)
    needed = {
        name
        for dimension in scoring.dimensions
        for name in (*IN_CLIP_NETWORKS[dimension], *SLOW_NETWORKS.get(dimension, ()))
    }
    if missing := [name for name in files.missing() if name in needed]:
        places = "\n  ".join(f"{name}: nothing at {files.places(name)[0]}" for name in missing)
        raise WeightsError(
            f"scoring.suite vbench_long needs networks that are not here:\n  {places}\n"
            f"Mend: {files.pull_command}, set scoring.weights to the folder that has them, or "
            "score without them (scoring.dimensions, or scoring.suite: preview)"
        )


def refuse_mixture(storage: Storage, place: str, scoring: ScoringSection) -> None:
    """ConfigError where trained and untrained networks would end up in one table, the rows below the folder `place`."""
    untrained = scoring.weights == RANDOM
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


def pending_items(run_dir: RolloutRun, config: RunConfig, *, settled: bool) -> list[Item]:
    """What is committed and not scored, in prompt-major order.

    With `settled` only rollouts whose every duration is committed: their files are the ones that will count.
    """
    identity = run_dir.require()
    scoring = config.scoring
    files = run_dir.storage.list_files(folder(scoring.mode))
    open_goals = [
        goal
        for goal in _goals(run_dir, identity, config, settled=settled)
        if f"{goal.folder}/{goal.last_file}" not in files
    ]
    begun = [path for path in files if path.rpartition("/")[0] in {goal.folder for goal in open_goals}]
    keys: dict[str, set[RowKey]] = {}
    for path, rows in read_row_files(run_dir.storage, begun).items():
        keys.setdefault(path.rpartition("/")[0], set()).update(row.key for row in rows)
    items = []
    for goal in open_goals:
        durations = [d for d in goal.durations if not _is_scored(goal, d, keys.get(goal.folder, set()))]
        if durations:
            items.append(Item(goal.video.partition("@")[0] if goal.nested else goal.path, goal.task(durations)))
    return items


def files_behind(run_dir: RolloutRun, config: RunConfig, damaged: Collection[str]) -> set[str]:
    """Files that say of a video that it is scored in full, where one of its files is among the `damaged`."""
    folders = {path.rpartition("/")[0] for path in damaged}
    goals = _goals(run_dir, run_dir.require(), config, settled=False)
    ends = {f"{goal.folder}/{goal.last_file}" for goal in goals if goal.folder in folders}
    return ends & run_dir.storage.list_files(folder(config.scoring.mode)).keys()


def _goals(run_dir: RolloutRun, identity: RunIdentity, config: RunConfig, *, settled: bool) -> Iterator[Goal]:
    scoring = config.scoring
    first_method = next(iter(config.methods))
    groups: dict[str, list[CommittedVideo]] = {}
    for video in committed_videos(run_dir):
        groups.setdefault(video.rollout.path, []).append(video)
    for videos in groups.values():
        rollout = videos[-1].rollout
        if settled and len(videos) < len({h.latent_frames for h in identity.backbones[rollout.backbone].horizons}):
            continue
        nested = identity.methods[rollout.method].nested
        # Independent durations are other rollouts: each file serves its own duration alone.
        for group in [videos] if nested else [[video] for video in videos]:
            file, fps = group[-1].video, group[-1].fps
            yield Goal(
                path=file.path,
                sha256=file.sha256,
                video=video_identity(rollout.path, file.sha256),
                durations=tuple(sorted({video.frames for video in group})),
                fps=fps,
                folder=rollout_folder(scoring.mode, rollout.path),
                dimensions=tuple(scoring.dimensions),
                nested=nested,
            )
        if "frozen" in scoring.controls and rollout.method == first_method:
            file, fps = videos[0].video, videos[0].fps
            yield Goal(
                path=file.path,
                sha256=file.sha256,
                video=frozen_identity(rollout.backbone, rollout.prompt_id, rollout.sample),
                durations=(2 * clip_length(fps),),
                fps=fps,
                folder=frozen_folder(scoring.mode, rollout.backbone, rollout.prompt_id, rollout.sample),
                dimensions=tuple(scoring.dimensions),
                frozen=True,
            )


def _is_scored(goal: Goal, duration: int, keys: Collection[RowKey]) -> bool:
    """Whether the rows of one file say all that is wanted of a duration."""
    clips = spans(duration, clip_length(goal.fps))
    if any(key.kind == "failure" and key.video == goal.video for key in keys):
        return True
    videos = {key.video for key in keys} if goal.nested else {goal.video}
    return any(all(key in keys for key in _wanted(video, goal.dimensions, clips, duration)) for video in videos)


def _wanted(video: str, dimensions: Sequence[Dimension], clips: Sequence[Span], duration: int) -> Iterator[RowKey]:
    for dimension in dimensions:
        yield from (RowKey(video, "clip", dimension, *span) for span in clips)
        if dimension in SLOW_NETWORKS and len(clips) > 1:
            yield RowKey(video, "clip_to_clip", dimension, 0, duration)

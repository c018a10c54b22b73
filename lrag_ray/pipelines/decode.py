"""Decode a run's stored latents again: everything that `lrag-ray decode` does is `decode`.

A run without videos gets them without a pass of the transformer, and a run with videos gets others (another quality,
frame rate or VAE precision). Commits stay as they are: the videos lie beside them (see `lrag_ray.store.decoded`). The
same call again continues.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.actor import no_room, pool_shape, spawn_actor
from lrag_ray.engine.pool import ActorPool, AttemptFailure
from lrag_ray.engine.queue import WorkItem
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import INTERRUPTED, ConfigError, IdentityError
from lrag_ray.events import Notice, Progress, StageAdvanced, StageBegan, StageEnded, WorkerLost, silent
from lrag_ray.stages.backbone import pixels_identity
from lrag_ray.stages.decode import DecodeActor, DecodeResult, DecodeSpec, DecodeTask
from lrag_ray.store.decoded import (
    decode_settings,
    decoded_folder,
    own_settings,
    read_decoded,
    record_path,
    settings_folder,
)
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.records import Commit
from lrag_ray.store.run_dir import CommitState, RunDirectory
from lrag_ray.weights.verify import refuse_misfits


@dataclass(frozen=True)
class DecodeFailure:
    """A rollout of which not every video could be made."""

    rollout: str
    """Its folder."""
    latent_frames: tuple[int, ...]
    """Horizons without a video."""
    reason: str


@dataclass(frozen=True)
class DecodeOutcome:
    """How a decode ended."""

    exit_code: int
    """0 all done, 1 finished with failures, 130 interrupted."""
    uri: str
    folders: tuple[str, ...]
    """Where the videos lie, one folder per kind of settings, relative to the run."""
    videos_there: int
    """Videos that needed no work: made before, or by the run itself with the same settings."""
    videos_made: int
    failed: tuple[DecodeFailure, ...]
    seconds: float


def decode(config: RunConfig, *, other_vae: bool = False, progress: Progress = silent) -> DecodeOutcome:
    """Decode every commit of the run at ``run.uri`` with the VAE and video settings of `config`.

    Backbones that `config` does not have are left out. Raises StorageError where there is no run; ConfigError where
    `config` has none of its backbones; IdentityError for a VAE other than the run's, unless `other_vae`; WeightsError
    for one that is absent or does not fit; ClusterError. Ctrl-C gives exit code 130; finished videos are kept.
    """
    job = _Job(with_absolute_paths(config), other_vae, progress)
    try:
        job.do()
    except KeyboardInterrupt:
        progress(Notice("interrupted; the same command continues", warning=True))
        return job.outcome(INTERRUPTED)
    return job.outcome(1 if job.failures else 0)


class _Job:
    """One start; also what the pool tells its events."""

    def __init__(self, config: RunConfig, other_vae: bool, progress: Progress) -> None:
        self._began = time.monotonic()
        self._config = config
        self._show = progress
        self._made = 0
        self._settled = 0
        self.failures: list[DecodeFailure] = []
        self._run = RunDirectory(config.run.uri, config.storage)
        identity = self._run.require()
        self._settings = _settings(config, identity, other_vae)
        if left_out := identity.backbones.keys() - self._settings.keys():
            progress(Notice(f"not in the configuration, so not decoded: {', '.join(sorted(left_out))}"))
        self._tasks: list[DecodeTask] = []
        self._there = 0
        self._find_work(identity)

    def do(self) -> None:
        """Make the videos that are not there."""
        if not self._tasks:
            return
        items = [
            WorkItem(f"{task.commits[-1].rollout.path}/{task.commits[-1].latent_frames}", order, _backbone(task), task)
            for order, task in enumerate(self._tasks)
        ]
        refuse_misfits(self._config, "vae")
        engine = self._config.engine
        with ray_session(engine):
            began = time.monotonic()
            self._show(StageBegan("decode", len(items)))
            spec = ray.put(DecodeSpec(self._run.storage.address, self._config))
            size, shape = pool_shape(engine)
            pool: ActorPool[DecodeTask, DecodeResult] = ActorPool(
                spawn=lambda name, memory: spawn_actor(DecodeActor, spec, name, engine, memory=memory),
                submit=lambda actor, task, attempt: actor.work.remote(task, attempt),
                listener=self,
                size=size,
                shape=shape,
                max_attempts=engine.max_attempts,
            )
            pool.run(items)
            self._show(StageEnded("decode", time.monotonic() - began))

    def outcome(self, exit_code: int) -> DecodeOutcome:
        """What to tell the caller."""
        return DecodeOutcome(
            exit_code=exit_code,
            uri=self._run.uri,
            folders=tuple(dict.fromkeys(map(settings_folder, self._settings.values()))),
            videos_there=self._there,
            videos_made=self._made,
            failed=tuple(self.failures),
            seconds=time.monotonic() - self._began,
        )

    def _find_work(self, identity: RunIdentity) -> None:
        inventory = self._run.inventory()
        decoded = read_decoded(self._run)
        for states in inventory.commits.values():
            open_commits = []
            for horizon, state in sorted(states.items()):
                commit = state.commit
                if commit is None or state.problem is not None:
                    self._refuse(state, horizon)
                    continue
                settings = self._settings.get(commit.rollout.backbone)
                if settings is None:
                    continue
                own = commit.video is not None and settings == own_settings(identity, commit.rollout.backbone)
                if own or decoded.of(commit, settings) is not None:
                    self._there += 1
                    continue
                path = record_path(settings, commit.rollout, horizon)
                if path in decoded.problems or path in decoded.records:
                    reason = decoded.problems.get(path, "its latents are not those of the commit")
                    kept = self._run.set_aside(path)
                    text = f"{path} does not count ({reason}); it is kept as {kept} and made again"
                    self._show(Notice(text, warning=True))
                open_commits.append(commit)
            for group in _prefix_groups(open_commits):
                self._tasks.append(DecodeTask(group, self._settings[group[0].rollout.backbone]))

    def _refuse(self, state: CommitState, horizon: int) -> None:
        folder = state.path.rsplit("/", 1)[0]
        reason = f"the commit does not count ({state.problem}); `lrag-ray run` makes it again"
        self._fail(folder, [horizon], reason)

    def _fail(self, folder: str, horizons: Iterable[int], reason: str) -> None:
        self.failures.append(DecodeFailure(folder, tuple(horizons), reason))
        self._show(Notice(f"{folder}: {reason}", warning=True))

    def _settle(self) -> None:
        self._settled += 1
        self._show(StageAdvanced("decode", self._settled, len(self._tasks)))

    def started(self, item: WorkItem[DecodeTask], attempt: str, worker: str) -> None:
        """Nothing to tell."""

    def finished(self, item: WorkItem[DecodeTask], result: DecodeResult) -> None:
        """Count what was made."""
        self._made += len(result.horizons)
        commits = item.payload.commits
        if result.problem is not None:
            missing = (c.latent_frames for c in commits if c.latent_frames not in result.horizons)
            self._fail(commits[0].rollout.path, missing, result.problem)
        self._settle()

    def yielded(self, item: WorkItem[DecodeTask], worker: str, reason: str) -> None:
        """A decode never yields: it is short."""

    def too_large(self, item: WorkItem[DecodeTask], largest_node: float) -> None:
        """A decode reserves no memory."""

    def failed(self, item: WorkItem[DecodeTask], attempt: str, failure: AttemptFailure) -> None:
        """Tell why an attempt failed; after the last one its rollout has failed."""
        commits = item.payload.commits
        if failure.quarantined:
            self._fail(commits[0].rollout.path, (c.latent_frames for c in commits), failure.reason)
            self._settle()
        else:
            text = f"{commits[0].rollout.path}: {failure.reason} (will be tried again)"
            self._show(Notice(text, warning=True))

    def worker_lost(self, worker: str, reason: str) -> None:
        """Pass it on."""
        self._show(WorkerLost(worker, reason))

    def unplaced(self, seconds: float) -> None:
        """Tell it."""
        self._show(Notice(no_room(self._config.engine, seconds), warning=True))

    def progress_of(self, item: WorkItem[DecodeTask]) -> int:
        """Files that the rollout's decodes have left."""
        task = item.payload
        return len(self._run.storage.list_files(decoded_folder(task.settings, task.commits[0].rollout)))

    def tick(self) -> None:
        """Nothing to show between videos."""


def _settings(config: RunConfig, identity: RunIdentity, other_vae: bool) -> dict[str, dict[str, Any]]:
    """What the videos of each backbone of the run are made with."""
    names = identity.backbones.keys() & config.backbones.keys()
    if not names:
        raise ConfigError(
            f"backbones: the run has {', '.join(identity.backbones)}, the configuration has "
            f"{', '.join(config.backbones)}. Mend: decode with the configuration of the run"
        )
    found = {}
    for name in sorted(names):
        pixels = pixels_identity(config.backbones[name])
        theirs, ours = (_without_dtype(each) for each in (identity.backbones[name].pixels, pixels))
        if theirs != ours and not other_vae:
            raise IdentityError(
                f"backbones.{name}.vae is {ours} here and {theirs} in the run. Mend: name the run's VAE, or give "
                "--other-vae to decode with this one all the same"
            )
        found[name] = decode_settings(pixels, config.video.model_dump())
    return found


def _without_dtype(pixels: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pixels["vae"].items() if key != "dtype"}


def _prefix_groups(commits: Iterable[Commit]) -> Iterator[tuple[Commit, ...]]:
    """Commits of a rollout in groups whose latent parts begin with those of the shorter ones: one decode serves all."""
    groups: list[list[Commit]] = []
    for commit in sorted(commits, key=lambda commit: -commit.latent_frames):
        parts = commit.latent_parts
        group = next((g for g in groups if g[0].latent_parts[: len(parts)] == parts), None)
        if group is None:
            groups.append([commit])
        else:
            group.append(commit)
    return (tuple(reversed(group)) for group in groups)


def _backbone(task: DecodeTask) -> str:
    return task.commits[0].rollout.backbone

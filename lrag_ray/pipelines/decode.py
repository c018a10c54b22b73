"""Decode a run's stored latents again: everything that `lrag-ray decode` does is `decode`.

A run without videos gets them without a pass of the transformer, and a run with videos gets others (another quality,
frame rate or VAE precision). Commits stay as they are: the videos are beside them (see `lrag_ray.store.decoded`). The
same call again continues.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.schema import RunConfig
from lrag_ray.config.vae import COMPUTES
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import ConfigError, IdentityError
from lrag_ray.events import Listener, silent
from lrag_ray.pipelines.job import Job
from lrag_ray.stages.backbone import pixels_identity
from lrag_ray.stages.decode import DecodeStage, DecodeTask
from lrag_ray.stages.spec import Task
from lrag_ray.store.decoded import (
    decode_settings,
    own_settings,
    read_decoded,
    record_path,
    settings_folder,
)
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.lease import DECODE
from lrag_ray.store.records import Commit
from lrag_ray.store.rollouts import RolloutRun
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
    """Where the videos are, one folder per kind of settings, relative to the run."""
    videos_there: int
    """Videos that needed no work: made before, or by the run itself with the same settings."""
    videos_made: int
    failed: tuple[DecodeFailure, ...]
    seconds: float


def decode(config: RunConfig, *, other_vae: bool = False, listener: Listener = silent) -> DecodeOutcome:
    """Decode every commit of the run at ``run.uri`` with the VAE and video settings of `config`.

    Backbones that `config` does not have are left out. Raises StorageError where there is no run; ConfigError where
    `config` has none of its backbones; IdentityError for a VAE other than the run's, unless `other_vae`; WeightsError
    for one that is absent or does not fit; ClusterError. Ctrl-C gives exit code 130; finished videos are kept.
    """
    return DecodeJob(config, other_vae, listener).start()


class DecodeJob(Job[DecodeOutcome]):
    """One start of a decode."""

    command = "decode"

    def __init__(self, config: RunConfig, other_vae: bool, listener: Listener) -> None:
        config = with_absolute_paths(config)
        run = RolloutRun(config.run.uri, config.storage)
        super().__init__(run.storage, config.engine, listener)
        self._config = config
        self._run = run
        self._failed: list[DecodeFailure] = []
        identity = run.require()
        self._settings = _settings(config, identity, other_vae)
        if left_out := identity.backbones.keys() - self._settings.keys():
            self.note(f"not in the configuration, so not decoded: {', '.join(sorted(left_out))}")
        self._tasks: list[Task[DecodeTask]] = []
        self._there = 0
        self._identity = identity

    @property
    def kinds(self) -> Sequence[str]:
        """Decoding, whatever the settings of the videos."""
        return [DECODE]

    def do(self) -> None:
        """Make the videos that are missing."""
        self._find_work(self._identity)
        if not self._tasks:
            return
        refuse_misfits(self._config, "vae")
        config = self._config
        stage = DecodeStage(self.storage.address, config.storage, config.backbones, config.video, config.engine)
        with ray_session(self.engine):
            failed = self.run_stage(stage, self._tasks)
        for task in failed:
            records = {record_path(task.payload.settings, c.rollout, c.latent_frames): c for c in task.payload.commits}
            there = self.storage.sizes(list(records))
            commits = [c for path, c in records.items() if path not in there]
            self.made["decode"] += len(task.payload.commits) - len(commits)
            self._failed.append(
                DecodeFailure(
                    task.payload.commits[0].rollout.path,
                    tuple(c.latent_frames for c in commits),
                    self.missing[task.title],
                )
            )

    def outcome(self, exit_code: int) -> DecodeOutcome:
        """What was made and what was not."""
        return DecodeOutcome(
            exit_code=exit_code,
            uri=self._run.uri,
            folders=tuple(dict.fromkeys(map(settings_folder, self._settings.values()))),
            videos_there=self._there,
            videos_made=self.made["decode"],
            failed=tuple(self._failed),
            seconds=self.seconds,
        )

    def _find_work(self, identity: RunIdentity) -> None:
        inventory = self._run.own_inventory(identity)
        decoded = read_decoded(self._run)
        for states in inventory.commits.values():
            open_commits = []
            for horizon, state in sorted(states.items()):
                commit = state.commit
                if commit is None or state.problem is not None:
                    folder = state.path.rsplit("/", 1)[0]
                    reason = f"the commit does not count ({state.problem}); `lrag-ray run` makes it again"
                    self._failed.append(DecodeFailure(folder, (horizon,), reason))
                    self.missing[folder] = reason
                    self.warn(f"{folder}: {reason}")
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
                    self.warn(text)
                open_commits.append(commit)
            for group in prefix_groups(open_commits):
                rollout = group[-1].rollout
                self._tasks.append(
                    Task(
                        key=f"{rollout.path}/{group[-1].latent_frames}",
                        payload=DecodeTask(group, self._settings[rollout.backbone]),
                        order=len(self._tasks),
                        group=rollout.backbone,
                    )
                )


def _settings(config: RunConfig, identity: RunIdentity, other_vae: bool) -> dict[str, dict[str, Any]]:
    """What the videos of each backbone of the run are made with."""
    names = identity.backbones.keys() & config.backbones.keys()
    if not names:
        raise ConfigError(
            f"backbones: the run has {', '.join(identity.backbones)}, the configuration has "
            f"{', '.join(config.backbones)}. Fix: decode with the configuration of the run"
        )
    found = {}
    for name in sorted(names):
        pixels = pixels_identity(config.backbones[name])
        theirs, ours = (_weights_of(each) for each in (identity.backbones[name].pixels, pixels))
        if theirs != ours and not other_vae:
            raise IdentityError(
                f"backbones.{name}.vae is {ours} here and {theirs} in the run. Fix: name the run's VAE, or give "
                "--other-vae to decode with this one all the same"
            )
        found[name] = decode_settings(pixels, config.video.model_dump())
    return found


def _weights_of(pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Which VAE it is, however it computes."""
    return {key: value for key, value in pixels["vae"].items() if key not in COMPUTES}


def prefix_groups(commits: Iterable[Commit]) -> Iterator[tuple[Commit, ...]]:
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

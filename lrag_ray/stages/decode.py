"""Decodes stored latents again: the actor of `lrag_ray.pipelines.decode`."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrag_ray.config.schema import BackboneConfig, EngineSection, StorageSection, VideoSection
from lrag_ray.errors import WeightsError
from lrag_ray.stages.backbone import device_for, load_vae, pixels_identity
from lrag_ray.stages.horizon_videos import HorizonVideos, put_video
from lrag_ray.stages.numerics import make_reproducible
from lrag_ray.stages.spec import Host, Outcome, Refused, Resources, Result, Stage, Task, WorkerState, Yielded
from lrag_ray.store.decoded import decode_settings, decoded_folder, record_path
from lrag_ray.store.parts import BrokenPartError, read_latents, value_bytes
from lrag_ray.store.records import HOW_TO_REPAIR, Commit, DecodedVideo, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.video.mp4 import Mp4Writer
from lrag_ray.wan import norm_silu
from lrag_ray.wan.devices import device_kind
from lrag_ray.wan.vae import WanVae

_FRAMES_AT_A_TIME = 3
"""Latent frames per push: bounds the pixels in memory; the result does not depend on it."""


@dataclass(frozen=True)
class DecodeTask:
    """Commits that one decode serves."""

    commits: tuple[Commit, ...]
    """Ascending; the latent parts of each are the first ones of the last."""
    settings: Mapping[str, Any]
    """What the driver expects the videos to be made with."""


@dataclass(frozen=True)
class DecodeStage(Stage[DecodeTask]):
    """Videos from stored latents.

    Needs what a rollout worker needs, without a history. Set up: torch's numerics; a VAE is loaded with its first
    video. Does: one rollout, decoded once for all its horizons. Returns: `Result` with the videos that exist now, or
    `Refused` where the latents are not those that were committed.
    """

    name = "decode"

    uri: str
    """Address of the run, credentials included: never shown."""
    storage: StorageSection
    backbones: Mapping[str, BackboneConfig]
    video: VideoSection
    engine: EngineSection

    @property
    def resources(self) -> Resources:
        """As the engine section says."""
        return Resources(self.engine.cpus_per_actor, self.engine.gpus_per_actor)

    def open(self, host: Host) -> DecodeWorker:
        """Set torch up."""
        return DecodeWorker(self, host)

    def progress(self, task: Task[DecodeTask]) -> int:
        """Files that the rollout's decodes have left."""
        folder = decoded_folder(task.payload.settings, task.payload.commits[0].rollout)
        return len(RolloutRun(self.uri, self.storage).storage.list_files(folder))


class DecodeWorker:
    """Keeps the VAE that it loaded last."""

    def __init__(self, stage: DecodeStage, host: Host) -> None:
        make_reproducible(stage.engine.threads_per_actor)
        self._stage = stage
        self._host = host
        self._run = RolloutRun(stage.uri, stage.storage)
        self._device = device_for(stage.resources.gpus)
        self._backbone = ""
        self._vae: WanVae | None = None

    def work(self, payload: DecodeTask, attempt: str) -> Outcome:
        """Make the video of every commit of the task.

        Latents that are not what the commits say refuse the task, after the videos that come before.
        """
        make_reproducible(self._stage.engine.threads_per_actor)
        began = time.perf_counter()
        # An attempt that died may have left some. By name, because a listing may lag.
        there = self._run.storage.sizes([_record_path(payload, commit) for commit in payload.commits])
        commits = {c.latent_frames: c for c in payload.commits if _record_path(payload, c) not in there}
        made = len(payload.commits) - len(commits)
        stored_bytes = 0
        if not commits:
            return Result(made=made)
        vae = self._held_vae(payload)
        title, digest, end = payload.commits[0].rollout.path, hashlib.sha256(), 0
        with scratch_folder() as scratch:
            videos = HorizonVideos(scratch, vae, list(commits), self._stage.video)
            try:
                for part in payload.commits[-1].latent_parts:
                    if self._host.must_leave():
                        return Yielded("its node is about to be taken away; finished videos are stored")
                    self._host.report(WorkerState(title, end, payload.commits[-1].latent_frames, "decoding"))
                    latents = read_latents(self._run.storage, part)
                    digest.update(value_bytes(latents))
                    for piece in latents.split(_FRAMES_AT_A_TIME):
                        videos.add(piece)
                    end += part.frames
                    if commit := commits.get(end):
                        if digest.hexdigest() != commit.latents_digest:
                            raise BrokenPartError(f"the first {end} latent frames are not those that were committed")
                        stored_bytes += self._store(payload, commit, videos.finish(end), attempt)
                        made += 1
            except BrokenPartError as error:
                return Refused(f"{error}. {HOW_TO_REPAIR}")
            finally:
                videos.abort()
        vae_config = self._stage.backbones[self._backbone].vae
        notes = tuple(norm_silu.notes(vae_config.fused_norm, self._device))
        return Result(made=made, seconds=time.perf_counter() - began, stored_bytes=stored_bytes, notes=notes)

    def _held_vae(self, task: DecodeTask) -> WanVae:
        """The VAE of the task's backbone; one at a time is in memory."""
        name = task.commits[0].rollout.backbone
        if self._vae is None or name != self._backbone:
            backbone = self._stage.backbones[name]
            if decode_settings(pixels_identity(backbone), self._stage.video.model_dump()) != task.settings:
                raise WeightsError(
                    f"backbones.{name}.vae: the file on node {platform.node()} is not the one on the node that started "
                    "this. Put the same file on every node"
                )
            self._backbone, self._vae = name, None
            self._vae = load_vae(backbone, self._device)
        return self._vae

    def _store(self, task: DecodeTask, commit: Commit, writer: Mp4Writer, attempt: str) -> int:
        """Returns the size of the video in bytes."""
        folder = f"{decoded_folder(task.settings, commit.rollout)}/attempt-{attempt}"
        record = DecodedVideo(
            rollout=commit.rollout,
            latent_frames=commit.latent_frames,
            latents_digest=commit.latents_digest,
            video=put_video(self._run.storage, writer.path, folder),
            frames=writer.frames,
            fps=self._stage.video.fps,
            settings=dict(task.settings),
            device_kind=device_kind(self._device),
            created_at=now_utc(),
        )
        # Where another attempt was first its video stands; this one is unnamed in the attempt's own folder.
        self._run.storage.create(_record_path(task, commit), record.sealed())
        return record.video.size_bytes


def _record_path(task: DecodeTask, commit: Commit) -> str:
    return record_path(task.settings, commit.rollout, commit.latent_frames)

"""Decodes stored latents again: the actor of `lrag_ray.pipelines.decode`."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.actor import make_reproducible
from lrag_ray.engine.oom import Place, this_place
from lrag_ray.errors import WeightsError
from lrag_ray.stages.backbone import device_for, load_vae, pixels_identity
from lrag_ray.stages.horizon_videos import HorizonVideos, put_video, value_bytes
from lrag_ray.store.decoded import decode_settings, decoded_folder, record_path
from lrag_ray.store.parts import BrokenPartError, read_latents
from lrag_ray.store.records import Commit, DecodedVideo, now_utc
from lrag_ray.store.run_dir import RunDirectory
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.video.mp4 import Mp4Writer
from lrag_ray.wan.vae import WanVae

_FRAMES_AT_A_TIME = 3
"""Latent frames per push: bounds the pixels in memory; the result does not depend on it."""


@dataclass(frozen=True)
class DecodeSpec:
    """What every actor is told."""

    uri: str
    """Address of the run, credentials included: never shown."""
    config: RunConfig


@dataclass(frozen=True)
class DecodeTask:
    """Commits that one decode serves."""

    commits: tuple[Commit, ...]
    """Ascending; the latent parts of each are the first ones of the last."""
    settings: Mapping[str, Any]
    """What the driver expects the videos to be made with."""


@dataclass(frozen=True)
class DecodeResult:
    """What an attempt did."""

    horizons: tuple[int, ...]
    """Latent frames of the videos that are there now."""
    problem: str | None
    """Why the others cannot be made, or None."""


class DecodeActor:
    """Needs: `engine.cpus_per_actor` CPUs and `engine.gpus_per_actor` GPUs. Does: one rollout at a time."""

    def __init__(self, spec: DecodeSpec, name: str) -> None:
        make_reproducible(spec.config.engine)
        self._run = RunDirectory(spec.uri, spec.config.storage)
        self._config = spec.config
        self._device = device_for(spec.config.engine.gpus_per_actor)
        self._backbone = ""
        self._vae: WanVae | None = None

    def ready(self) -> Place:
        """Return where the actor lives when it can work."""
        return this_place()

    def work(self, task: DecodeTask, attempt: str) -> DecodeResult:
        """Make the video of every commit of the task.

        Latents that are not what the commits say end the task with a problem, after the videos that come before.
        """
        there = self._run.storage.list_files(decoded_folder(task.settings, task.commits[0].rollout))
        commits = {c.latent_frames: c for c in task.commits if _record_path(task, c) not in there}
        # An attempt that died may have left some.
        made = [commit.latent_frames for commit in task.commits if commit.latent_frames not in commits]
        if not commits:
            return DecodeResult(tuple(made), None)
        vae = self._held_vae(task)
        digest, end = hashlib.sha256(), 0
        with scratch_folder() as scratch:
            videos = HorizonVideos(scratch, vae, list(commits), self._config.video)
            try:
                for part in task.commits[-1].latent_parts:
                    latents = read_latents(self._run.storage, part)
                    digest.update(value_bytes(latents))
                    for piece in latents.split(_FRAMES_AT_A_TIME):
                        videos.add(piece)
                    end += part.frames
                    if commit := commits.get(end):
                        if digest.hexdigest() != commit.latents_digest:
                            raise BrokenPartError(f"the first {end} latent frames are not those that were committed")
                        self._store(task, commit, videos.finish(end), attempt)
                        made.append(end)
            except BrokenPartError as error:
                return DecodeResult(tuple(made), str(error))
            finally:
                videos.abort()
        return DecodeResult(tuple(made), None)

    def _held_vae(self, task: DecodeTask) -> WanVae:
        """The VAE of the task's backbone; one at a time lies in memory."""
        name = task.commits[0].rollout.backbone
        if self._vae is None or name != self._backbone:
            backbone = self._config.backbones[name]
            if decode_settings(pixels_identity(backbone), self._config.video.model_dump()) != task.settings:
                raise WeightsError(
                    f"backbones.{name}.vae: the file on node {platform.node()} is not the one on the node that started "
                    "this. Mend: put the same file on every node"
                )
            self._backbone, self._vae = name, None
            self._vae = load_vae(backbone, self._device)
        return self._vae

    def _store(self, task: DecodeTask, commit: Commit, writer: Mp4Writer, attempt: str) -> None:
        folder = f"{decoded_folder(task.settings, commit.rollout)}/attempt-{attempt}"
        record = DecodedVideo(
            rollout=commit.rollout,
            latent_frames=commit.latent_frames,
            latents_digest=commit.latents_digest,
            video=put_video(self._run.storage, writer.path, folder),
            frames=writer.frames,
            fps=self._config.video.fps,
            settings=dict(task.settings),
            device_kind=torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            created_at=now_utc(),
        )
        # Where another attempt was first its video stands; this one lies unnamed in the attempt's own folder.
        self._run.storage.create(_record_path(task, commit), record.model_dump_json(indent=1).encode())


def _record_path(task: DecodeTask, commit: Commit) -> str:
    return record_path(task.settings, commit.rollout, commit.latent_frames)

"""Identities, parts and commits of a small run, for the tests of the store."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from lrag_ray.context.trace import ALL_LAYERS, TraceRow
from lrag_ray.store.identity import BackboneIdentity, Horizon, MethodIdentity, PromptIdentity, RunIdentity
from lrag_ray.store.parts import FinishedBlock, write_part
from lrag_ray.store.records import Commit, FileRecord, PartRecord, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun

FRAMES_PER_BLOCK = 3


def make_identity(**changes: Any) -> RunIdentity:
    """Two prompts, one backbone, one method, horizons of 6 and 12 latent frames."""
    fields: dict[str, Any] = {
        "numerics_version": 1,
        "seed": 0,
        "samples": 1,
        "video": {"fps": 16},
        "backbones": {
            "tiny": BackboneIdentity(
                latents={"weights": "w0"},
                pixels={"vae": "v0"},
                label="",
                frames_per_block=FRAMES_PER_BLOCK,
                horizons=[Horizon(duration_s=1.5, latent_frames=6), Horizon(duration_s=3, latent_frames=12)],
            )
        },
        "methods": {"base": MethodIdentity(method="base", settings={"window": 12}, nested=True)},
        "prompts": {"00000-aa": PromptIdentity(index=0, text="a"), "00001-bb": PromptIdentity(index=1, text="b")},
        "created_at": now_utc(),
    }
    return RunIdentity(**{**fields, **changes})


def rollout_id(prompt_id: str = "00000-aa", method: str = "base") -> RolloutId:
    return RolloutId(backbone="tiny", method=method, prompt_id=prompt_id)


def make_blocks(first: int, count: int) -> list[FinishedBlock]:
    generator = torch.Generator().manual_seed(first)
    return [
        FinishedBlock(
            block,
            torch.randn(FRAMES_PER_BLOCK, 2, 4, 4, generator=generator).bfloat16(),
            [TraceRow(block, ALL_LAYERS, "current", block * 3 + i, i, 4, None) for i in range(3)],
            {"kept": torch.arange(block + 1)},
        )
        for block in range(first, first + count)
    ]


def store_part(run: RolloutRun, first: int, count: int, *, key: str, attempt: str = "one") -> PartRecord:
    folder = f"{rollout_id().path}/attempt-{attempt}"
    return write_part(run.storage, folder, make_blocks(first, count), rollout_key=key, device_kind="cpu")


def store_commit(run: RolloutRun, identity: RunIdentity, rollout: RolloutId, latent_frames: int) -> Commit:
    """Parts, a pretended video and the commit of one horizon."""
    folder = f"{rollout.path}/attempt-one"
    key = identity.rollout_key(rollout, latent_frames)
    blocks = make_blocks(0, latent_frames // FRAMES_PER_BLOCK)
    part = write_part(run.storage, folder, blocks, rollout_key=key, device_kind="cpu")
    pixels = b"pixels" * latent_frames
    video = FileRecord(
        path=f"{folder}/video-{latent_frames}.mp4",
        size_bytes=len(pixels),
        sha256=hashlib.sha256(pixels).hexdigest(),
    )
    run.storage.write(video.path, pixels)
    commit = Commit(
        rollout=rollout,
        rollout_key=key,
        latent_frames=latent_frames,
        attempt="one",
        latent_parts=[part.latents],
        trace_parts=[part.trace],
        video=video,
        video_frames=1 + 4 * (latent_frames - 1),
        fps=16,
        latents_digest="d",
        device_kind="cpu",
        versions={},
        timings_s={},
        created_at=now_utc(),
    )
    assert run.commit(commit)
    return commit

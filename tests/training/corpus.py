"""A run directory with latents of slowly moving scenes, made without Ray and without a generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from lrag_ray.store.dataset_files import values_digest
from lrag_ray.store.parts import FinishedBlock, write_part
from lrag_ray.store.records import Commit, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.wan.keyed import keyed_generator
from tests.report.make_run import make_identity, store_video, trace_rows

SHAPE = (16, 8, 12)


def scene(index: int, frames: int) -> Tensor:
    """A fixed pattern that drifts [frames, 16, 8, 12]: neighbours are alike, distant frames are not."""
    generator = keyed_generator("scene", index)
    field = torch.randn(SHAPE[0], SHAPE[1], SHAPE[2] * 4, generator=generator)
    field = (field + field.roll(1, -1) + field.roll(2, -1) + field.roll(1, -2)) / 2
    base = torch.randn(SHAPE[0], 1, 1, generator=generator)
    wide = torch.nn.functional.interpolate(field[None], scale_factor=(1, 4), mode="bilinear")[0]
    return torch.stack([wide[..., 2 * t : 2 * t + 4 * SHAPE[2] : 4] + base for t in range(frames)])


def make_corpus(
    folder: Path,
    count: int = 12,
    frames: int = 24,
    latents: Callable[[int, int], Tensor] = scene,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
    video: Callable[[int, int], NDArray[np.uint8]] | None = None,
) -> str:
    """Commit `count` rollouts of `frames` latent frames in parts of 12; returns the run's address.

    `video` gives the video frames [4 * frames - 3, H, W, 3] of a rollout.
    """
    identity = make_identity([f"scene {i}" for i in range(first + count)], ["base"], [frames])
    run = RolloutRun(str(folder))
    identity = run.ensure(identity)
    for prompt_id, prompt in identity.prompts.items():
        rollout = RolloutId(backbone="tiny", method="base", prompt_id=prompt_id)
        if prompt.index < first:
            continue
        key = identity.rollout_key(rollout, frames)
        values = latents(prompt.index, frames).to(dtype).contiguous()
        parts = []
        for start in range(0, frames, 12):
            blocks = [
                FinishedBlock(f // 3, values[f : f + 3].contiguous(), trace_rows(f // 3, retrieves=False), {})
                for f in range(start, min(start + 12, frames), 3)
            ]
            parts.append(
                write_part(run.storage, f"{rollout.path}/attempt-one", blocks, rollout_key=key, device_kind="cpu")
            )
        shown = video(prompt.index, frames) if video is not None else None
        path = f"{rollout.path}/attempt-one/video-{frames}.mp4"
        commit = Commit(
            rollout=rollout, rollout_key=key, latent_frames=frames, attempt="one",
            latent_parts=[part.latents for part in parts], trace_parts=[part.trace for part in parts],
            video=store_video(run, path, shown) if shown is not None else None,
            video_frames=len(shown) if shown is not None else 0, fps=16,
            latents_digest=values_digest(values), device_kind="cpu",
            versions={}, timings_s={}, created_at=now_utc(),
        )  # fmt: skip
        assert run.commit(commit)
    return str(folder)


def training_file(path: Path, corpus: str, uri: str, **changes: Any) -> Path:
    """A configuration of a small training."""
    content: dict[str, Any] = {
        "job": "train_encoder",
        "run": {"uri": uri, "seed": 3},
        "data": {"uris": [corpus], "validation_fraction": 0.25, "window_frames": 6},
        "encoder": {"latent_dim": 16, "hidden_dims": [8, 16]},
        "training": {"epochs": 4, "batch_size": 4},
        "engine": {"actors": 2, "checkpoint_every_steps": 2},
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path

"""A small encoder and latents in memory, for tests of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.training.loop import Leave, LossRow, Progress, Trainer, TrainingSettings
from lrag_ray.training.peers import Peers
from lrag_ray.training.read_ahead import UnusableWindowError, WindowReader
from lrag_ray.training.windows import Rollouts, Window, WindowSampler, in_validation
from lrag_ray.wan.keyed import keyed_generator

SHAPE = (4, 6, 10)
SIZES = EncoderConfig(in_channels=4, spatial_h=6, spatial_w=10, latent_dim=8, hidden_dims=(8,))
LENGTH = 4


def make_rollouts(count: int, frames: int = 9, fraction: float = 0.25) -> Rollouts:
    keys = sorted(f"{i:04d}{'k' * 4}" for i in range(count))
    return Rollouts(keys, np.full(count, frames), np.array([in_validation(key, fraction) for key in keys]))


def latents(rollouts: Rollouts) -> list[Tensor]:
    """A slow walk of each rollout [frames, C, H, W]."""
    found = []
    for key, frames in zip(rollouts.keys, rollouts.frames, strict=True):
        generator = keyed_generator("latents", key)
        start = torch.randn(1, *SHAPE, generator=generator)
        found.append(start + 0.2 * torch.randn(int(frames), *SHAPE, generator=generator).cumsum(0))
    return found


def reader_of(data: Sequence[Tensor], broken: Window | None = None) -> WindowReader:
    def read_into(window: Window, out: Tensor) -> None:
        if window == broken:
            raise UnusableWindowError(f"rollout {window.rollout} is damaged")
        out.copy_(data[window.rollout][window.start : window.start + LENGTH])

    return WindowReader(read_into, (LENGTH, *SHAPE), torch.float32, lambda w: f"rollout {w.rollout} from {w.start}")


class Memory:
    """A sink that keeps what a run would store; `stop_at` asks to stop before that step."""

    def __init__(self, stop_at: int | None = None, die_at: int | None = None) -> None:
        self.last: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.rows: list[LossRow] = []
        self.stop_at, self.die_at = stop_at, die_at
        self.progress: list[Progress] = []
        self.steps = 0

    def restore(self) -> tuple[dict[str, Any], str] | None:
        return None if self.last is None else (self.last, "memory")

    def save(self, checkpoint: dict[str, Any], rows: Sequence[LossRow]) -> None:
        self.last = checkpoint
        self.rows += rows

    def save_best(self, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint

    def advance(self, progress: Progress) -> None:
        self.progress.append(progress)

    def leave(self) -> Leave:
        if self.die_at is not None and self.progress[-1].step == self.die_at:
            self.die_at = None
            raise ConnectionError("a peer died")
        if self.stop_at is not None and self.progress[-1].step == self.stop_at:
            self.stop_at = None
            return "stop"
        return ""

    def close(self) -> None:
        pass


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"sizes": SIZES, "epochs": 3, "seed": 7, "checkpoint_every_steps": 2, **changes})


def make_trainer(
    sink: Memory,
    *,
    rollouts: Rollouts | None = None,
    batch_size: int = 4,
    reader: WindowReader | None = None,
    peers: Peers | None = None,
    **changes: Any,
) -> Trainer:
    rollouts = rollouts or make_rollouts(18)
    found = settings(**changes)
    sampler = WindowSampler(rollouts, LENGTH, batch_size, found.seed)
    return Trainer(found, sampler, reader or reader_of(latents(rollouts)), sink, peers=peers)

"""Which windows of a dataset an encoder is trained on, in which order.

A window is a run of consecutive latent frames of one rollout. An epoch takes one window of every rollout of the
training split, as the released trainer does. The order is a function of (seed, epoch, position) alone: workers take
slices of it, so it depends neither on their number nor on what was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lrag_ray.wan.keyed import keyed_generator


class Window(NamedTuple):
    """Consecutive latent frames of one rollout."""

    rollout: int
    """Position of the rollout among those of the training."""
    start: int
    """First latent frame."""


def in_validation(key: str, fraction: float) -> bool:
    """Whether the rollout with this key belongs to the validation split.

    It depends on the key alone, so a dataset that grows never moves a rollout from one split to the other.
    """
    digest = hashlib.sha256(b"validation:" + key.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class Rollouts(NamedTuple):
    """The rollouts of a training, by key."""

    keys: Sequence[str]
    """Ascending and unique."""
    frames: NDArray[np.int64]
    """Latent frames of each."""
    validation: NDArray[np.bool_]
    """Which of them are in the validation split."""


@dataclass(frozen=True)
class WindowSampler:
    """Windows of `length` frames of the `rollouts`, none of which is shorter."""

    rollouts: Rollouts
    length: int
    batch_size: int
    """Windows per batch, over all workers; the last batch of an epoch may hold fewer."""
    seed: int

    @cached_property
    def training(self) -> NDArray[np.int64]:
        """Positions of the rollouts of the training split."""
        return np.flatnonzero(~self.rollouts.validation)

    @cached_property
    def batches_per_epoch(self) -> int:
        """At least 1 where there is a rollout: a small dataset gives one smaller batch."""
        return -(-len(self.training) // self.batch_size)

    def batch(self, epoch: int, position: int) -> list[Window]:
        """The global batch at `position` of `epoch`, both from 0."""
        order, draws = _epoch(self.seed, epoch, len(self.training))
        span = slice(position * self.batch_size, (position + 1) * self.batch_size)
        return [
            self._window(int(self.training[at]), float(draw)) for at, draw in zip(order[span], draws[span], strict=True)
        ]

    def validation_batches(self) -> list[list[Window]]:
        """One window of every rollout of the validation split, the same in every epoch, in global batches."""
        chosen = np.flatnonzero(self.rollouts.validation)
        windows = []
        for at in chosen:
            key = self.rollouts.keys[int(at)]
            draw = torch.rand((), generator=keyed_generator("validation window", self.seed, key), dtype=torch.float64)
            windows.append(self._window(int(at), float(draw)))
        return [windows[first : first + self.batch_size] for first in range(0, len(windows), self.batch_size)]

    def _window(self, rollout: int, draw: float) -> Window:
        places = int(self.rollouts.frames[rollout]) - self.length + 1
        return Window(rollout, min(int(draw * places), places - 1))


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The order of the rollouts of an epoch, and a draw from [0, 1) for the window of each position."""
    generator = keyed_generator("training epoch", seed, epoch)
    order = torch.randperm(count, generator=generator)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    return order.numpy(), draws.numpy()


def share_of(batch: Sequence[Window], rank: int, workers: int) -> Sequence[Window]:
    """The consecutive slice of a global batch that worker `rank` takes; slices differ by at most one window."""
    return batch[len(batch) * rank // workers : len(batch) * (rank + 1) // workers]

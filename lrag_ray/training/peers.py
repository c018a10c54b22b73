"""The other workers of a training, as the loop sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Peers(Protocol):
    """All workers take every call of this together, in the same order."""

    @property
    def rank(self) -> int:
        """Of this worker, from 0."""

    @property
    def size(self) -> int:
        """Number of workers."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all workers, in place; all workers get the same bytes."""

    def gather(self, text: str) -> list[str]:
        """The texts of all workers, by rank."""


class Alone:
    """One worker without others."""

    rank = 0
    size = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to add."""

    def gather(self, text: str) -> list[str]:
        """The worker's own text."""
        return [text]


class ProcessGroup:
    """The workers of torch's default process group, which must have been set up."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """One all-reduce over all tensors, which are float32 on one device."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        first = 0
        for tensor in tensors:
            tensor.copy_(flat[first : first + tensor.numel()].view_as(tensor))
            first += tensor.numel()

    def gather(self, text: str) -> list[str]:
        """Texts through the process group."""
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, text)
        return [found or "" for found in texts]

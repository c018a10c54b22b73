"""The history bank: K and V of the frames that left the window, kept until the rollout ends.

One latent frame is 287.5 MB at full size in bf16, a 120 s rollout evicts 468 of them. So the bank lives off the
device; the frames that the next block retrieves cross the bus once, while the clean-context pass still runs.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class HistoryBank(ABC):
    """Frames by global index. A frame's rows are unrotated K and V of all layers [2, layers, f, H, head_dim]."""

    @abstractmethod
    def append(self, frame: int, rows: Tensor) -> None:
        """Keep a copy of `rows`; work queued on the current stream after this call may overwrite them."""

    @abstractmethod
    def prefetch(self, frames: Sequence[int]) -> None:
        """Start to bring those of `frames` that are held to the device; the next `gather` will ask for them."""

    @abstractmethod
    def gather(self, frames: Sequence[int]) -> list[Tensor]:
        """Rows of each frame on the rollout's device; valid until the next `prefetch`. KeyError for an absent one."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""


class HostBank(HistoryBank):
    """One slab of exactly a frame's size per frame in host memory.

    On the CPU, host and device are the same memory: a frame is copied once, when it is appended, and gathered without
    a copy. With a GPU the slabs are page-locked and both directions are asynchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slabs: dict[int, Tensor] = {}
        self._staged: dict[int, Tensor] = {}
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._appended: torch.cuda.Event | None = None
            self._arrived: torch.cuda.Event | None = None
            weakref.finalize(self, _unlock, self._slabs)

    def append(self, frame: int, rows: Tensor) -> None:
        """Copy a frame to its slab."""
        slab = torch.empty(rows.shape, dtype=rows.dtype)
        if self._cuda:
            _lock(slab)
        slab.copy_(rows, non_blocking=True)
        self._slabs[frame] = slab
        if self._cuda:
            self._appended = torch.cuda.current_stream(self._device).record_event()

    def prefetch(self, frames: Sequence[int]) -> None:
        """Copy to the device on a stream of its own, behind the appends but beside what was launched since."""
        if not self._cuda or self._appended is None:
            return
        self._stream.wait_event(self._appended)
        with torch.cuda.stream(self._stream):
            self._staged = {f: self._slabs[f].to(self._device, non_blocking=True) for f in frames if f in self._slabs}
            self._arrived = self._stream.record_event()

    def gather(self, frames: Sequence[int]) -> list[Tensor]:
        """The slabs themselves on the CPU; on a GPU the prefetched copies, or fresh ones."""
        if not self._cuda:
            return [self._slabs[frame] for frame in frames]
        current = torch.cuda.current_stream(self._device)
        if self._arrived is not None:
            current.wait_event(self._arrived)
        rows = []
        for frame in frames:
            row = self._staged.get(frame)
            if row is None:
                row = self._slabs[frame].to(self._device, non_blocking=True)
            # The allocator must not hand this memory on while the compute stream still reads it.
            row.record_stream(current)
            rows.append(row)
        return rows

    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self._slabs.values())


def _lock(slab: Tensor) -> None:
    """Page-lock a slab in place: the pinned allocator would round 287.5 MB up to 512 MB."""
    status = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)
    if int(status) != 0:
        raise MemoryError(f"cannot page-lock {slab.nbytes} bytes for the history bank (CUDA error {int(status)})")


def _unlock(slabs: dict[int, Tensor]) -> None:
    for slab in slabs.values():
        torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())

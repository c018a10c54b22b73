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

from lrag_ray.retrieval.slabs import PAGE_LOCKED, PAGEABLE, SlabPool


class HistoryBank(ABC):
    """Frames by global index. A frame's rows are unrotated K and V of all layers [2, layers, f, H, head_dim]."""

    def reserve(self, frames: int, frame_bytes: int) -> None:
        """Called while the device is busy: `count` appends of `nbytes` bytes will follow."""

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
        self._cuda = device.type == "cuda"
        self._pool = PAGE_LOCKED if self._cuda else PAGEABLE
        self._slabs: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        """The slabs as frames."""
        self._staged: dict[int, Tensor] = {}
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._appended: torch.cuda.Event | None = None
            self._arrived: torch.cuda.Event | None = None
            # At exit the system takes everything; the driver may be gone by then.
            weakref.finalize(self, _give_back, device, self._pool, self._slabs).atexit = False

    def reserve(self, frames: int, frame_bytes: int) -> None:
        """Make slabs ahead. On the CPU nothing is busy meanwhile, so there is nothing to gain."""
        if self._cuda:
            self._pool.reserve(frame_bytes, frames)

    def append(self, frame: int, rows: Tensor) -> None:
        """Copy a frame to its slab. MemoryError where the host has no room for one more."""
        slab = self._pool.take(rows.nbytes)
        self._slabs[frame] = slab
        self._rows[frame] = slab.view(rows.dtype).view(rows.shape)
        self._rows[frame].copy_(rows, non_blocking=True)
        if self._cuda:
            self._appended = torch.cuda.current_stream(self._device).record_event()

    def prefetch(self, frames: Sequence[int]) -> None:
        """Copy to the device on a stream of its own, behind the appends but beside what was launched since."""
        if not self._cuda or self._appended is None:
            return
        self._stream.wait_event(self._appended)
        with torch.cuda.stream(self._stream):
            self._staged = {f: self._rows[f].to(self._device, non_blocking=True) for f in frames if f in self._rows}
            self._arrived = self._stream.record_event()

    def gather(self, frames: Sequence[int]) -> list[Tensor]:
        """The slabs themselves on the CPU; on a GPU the prefetched copies, or fresh ones."""
        if not self._cuda:
            return [self._rows[frame] for frame in frames]
        current = torch.cuda.current_stream(self._device)
        if self._arrived is not None:
            current.wait_event(self._arrived)
        rows = []
        for frame in frames:
            # Handed over, not kept: who gathers decides how long the device holds them.
            row = self._staged.pop(frame, None)
            if row is None:
                row = self._rows[frame].to(self._device, non_blocking=True)
            # The allocator must not hand this memory on while the compute stream still reads it.
            row.record_stream(current)
            rows.append(row)
        return rows

    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self._slabs.values())


def _give_back(device: torch.device, pool: SlabPool, slabs: dict[int, Tensor]) -> None:
    """Return the slabs of a bank that is gone, once no copy from or to them is under way."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        # The device failed: nothing is known of its copies, so this memory is never used again.
        return
    pool.give_back(slabs.values())

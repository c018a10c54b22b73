"""The history bank: K and V of the frames that left the window, kept until the rollout ends.

One latent frame is 287.5 MB at full size in bf16, a 120 s rollout evicts 468 of them. So the bank lives off the
device. Both directions of the bus have a stream of their own beside the compute stream: evicted frames leave during the
block that evicts them, and the frames that the next block retrieves cross once, while the clean-context pass runs.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lrag_ray.retrieval.slabs import PAGE_LOCKED, PAGEABLE, SlabPool
from lrag_ray.wan.streams import side_stream


class HistoryBank(ABC):
    """Frames by global index. A frame's rows are unrotated K and V of all layers [2, layers, f, H, head_dim]."""

    def reserve(self, frames: int, frame_bytes: int) -> None:
        """Called while the device is busy: `count` appends of `nbytes` bytes will follow."""

    @abstractmethod
    def append(self, frame: int, rows: Tensor) -> None:
        """Keep a copy of `rows`, which must stay as they are until `settle`."""

    def settle(self) -> None:
        """What is queued on the current stream after this call may overwrite the rows of all appends.

        A rollout calls it ahead of each clean-context pass. A policy that overwrites cached rows earlier in a block
        calls it itself.
        """

    @abstractmethod
    def prefetch(self, frames: Sequence[int]) -> None:
        """Start to bring those of `frames` that are held to the device; the next `gather` will ask for them."""

    @abstractmethod
    def gather(self, frames: Sequence[int]) -> list[Tensor]:
        """Rows of `frames` in order, on the rollout's device, in as few tensors [n, 2, layers, f, H, head_dim] as
        their memory allows; valid until the next `prefetch`. KeyError for an absent frame."""

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
        self._staged: list[int] = []
        """Frames that `_arriving` holds."""
        self._arriving: Tensor | None = None
        if self._cuda:
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
        self._rows[frame] = self._place(frame, rows)
        if not self._cuda:
            self._rows[frame].copy_(rows)
            return
        stream = side_stream(self._device, "to host")
        stream.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(stream):
            self._rows[frame].copy_(rows, non_blocking=True)
            self._appended = stream.record_event()
        # The allocator must not hand this memory on while the copy still reads it.
        rows.record_stream(stream)

    def _place(self, frame: int, rows: Tensor) -> Tensor:
        """Where a frame goes: a slab of its own."""
        slab = self._slabs[frame] = self._pool.take(rows.nbytes)
        return slab.view(rows.dtype).view(rows.shape)

    def settle(self) -> None:
        """The compute stream waits for the appends, which are done long before."""
        if self._cuda and self._appended is not None:
            torch.cuda.current_stream(self._device).wait_event(self._appended)

    def prefetch(self, frames: Sequence[int]) -> None:
        """Copy to the device, behind the appends but beside what was launched since."""
        if not self._cuda or self._appended is None:
            return
        stream = side_stream(self._device, "to device")
        stream.wait_event(self._appended)
        self._staged = [frame for frame in frames if frame in self._rows]
        self._arriving = None
        if self._staged:
            with torch.cuda.stream(stream):
                self._arriving = self._copied(self._staged)
                self._arrived = stream.record_event()

    def gather(self, frames: Sequence[int]) -> list[Tensor]:
        """The slabs themselves on the CPU; on a GPU the prefetched copy, or a fresh one, in one tensor."""
        if not self._cuda:
            return [self._rows[frame][None] for frame in frames]
        if not frames:
            return []
        # Handed over, not kept: who gathers decides how long the device holds them.
        rows, self._arriving = self._arriving, None
        if rows is None or self._staged != list(frames):
            return [self._copied(frames)]
        current = torch.cuda.current_stream(self._device)
        assert self._arrived is not None, "what was prefetched has an event"
        current.wait_event(self._arrived)
        rows.record_stream(current)
        return [rows]

    def _copied(self, frames: Sequence[int]) -> Tensor:
        """Rows of the frames, on their way to the device on the current stream."""
        first = self._rows[frames[0]]
        rows = torch.empty((len(frames), *first.shape), dtype=first.dtype, device=self._device)
        for row, frame in zip(rows, frames, strict=True):
            row.copy_(self._rows[frame], non_blocking=True)
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

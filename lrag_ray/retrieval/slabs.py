"""Host memory for the history bank: one page-aligned slab per latent frame.

A frame is 287.5 MB at full size and a block evicts three, so it matters what fresh memory costs: touching it page by
page takes longer than a GPU needs for a pass. Slabs therefore ask the kernel for huge pages, are made ahead while the
device is busy, and, where making them also means to page-lock them, are used again by the next rollout of the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import Tensor

_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every device of the process, not for the current one alone."""


class SlabPool:
    """Slabs of the size that is asked for. With `lock` they are locked when they are made, and kept when given back."""

    def __init__(
        self, lock: Callable[[Tensor], None] | None = None, unlock: Callable[[Tensor], None] = lambda slab: None
    ) -> None:
        """`lock` raises MemoryError where it cannot: then the slab stays pageable and is counted.

        Slabs of another size than requested are released by `unlock`.
        """
        self._lock, self._unlock = lock, unlock
        self._free: list[Tensor] = []
        self._pageable: set[int] = set()
        """Addresses of slabs that could not be locked."""
        self.refusal = ""
        """Why the last of them could not."""

    @property
    def pageable(self) -> int:
        """Slabs that should have been locked and could not be."""
        return len(self._pageable)

    def take(self, nbytes: int) -> Tensor:
        """A slab uint8 [nbytes] of any content. MemoryError where there is no room for one."""
        while self._free:
            # One step, not look and then take: a bank may give back from another thread.
            slab = self._free.pop()
            if len(slab) == nbytes:
                return slab
            self._release(slab)
        return self._made(nbytes)

    def reserve(self, nbytes: int, count: int) -> None:
        """Have `count` such slabs ready. Where there is no room for them, `take` raises."""
        ready: list[Tensor] = []
        with suppress(MemoryError):
            while len(ready) < count:
                ready.append(self.take(nbytes))
        self._free += ready

    def give_back(self, slabs: Iterable[Tensor]) -> None:
        """Nothing uses these any more."""
        if self._lock is not None:
            self._free += slabs

    def _made(self, nbytes: int) -> Tensor:
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {nbytes:,} bytes of host memory for the history bank: {error.strerror}") from error
        with suppress(OSError):
            # Advice alone: a kernel without huge pages refuses it.
            memory.madvise(mmap.MADV_HUGEPAGE)
        slab = torch.frombuffer(memory, dtype=torch.uint8)
        if self._lock is not None:
            try:
                self._lock(slab)
            except MemoryError as error:
                self._pageable.add(slab.data_ptr())
                self.refusal = str(error)
        return slab

    def _release(self, slab: Tensor) -> None:
        if slab.data_ptr() in self._pageable:
            self._pageable.remove(slab.data_ptr())
        else:
            self._unlock(slab)


def _page_lock(slab: Tensor) -> None:
    """In place: torch's own pinned allocator would round 287.5 MB up to 512 MB."""
    status = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), len(slab), _PORTABLE))
    if status != 0:
        with suppress(RuntimeError):
            # CUDA keeps the error, and torch would blame the next kernel of this thread for it: this one takes it.
            torch.ones((), device="cuda")
        raise MemoryError(f"CUDA error {status} for {len(slab):,} bytes")


def _page_unlock(slab: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())


PAGEABLE = SlabPool()
"""For banks on the CPU: what is given back returns to the system."""
PAGE_LOCKED = SlabPool(_page_lock, _page_unlock)
"""For banks beside a GPU. An actor reserves the memory of its longest history for as long as it lives."""

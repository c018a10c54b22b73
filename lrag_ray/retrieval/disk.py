"""The last tier of the history bank: a memory-mapped file on a local disk."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor


class SpillFile:
    """Frames of one size in a file that has no name, so that no exit leaves it behind, not even SIGKILL.

    A slot is allocated before it is mapped: a full disk is an OSError here and never a SIGBUS at a later write.
    """

    def __init__(self, folder: Path, frame_bytes: int, frames: int = 0) -> None:
        """Open a file in `folder` and allocate `frames` slots. OSError where that is impossible."""
        self._folder, self._frame_bytes = folder, frame_bytes
        self._slot_bytes = -(-frame_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._maps: dict[int, mmap.mmap] = {}
        self._allocated = 0
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._fd = os.dup(file.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f"{folder}: cannot keep history here: {error.strerror}. Fix: set engine.bank.disk to an existing, "
                "writable folder on a local disk of every node",
            ) from error
        weakref.finalize(self, os.close, self._fd)
        if frames:
            self._allocate(frames)

    def __contains__(self, frame: int) -> bool:
        return frame in self._maps

    def __len__(self) -> int:
        return len(self._maps)

    def write(self, frame: int, packed: Tensor) -> None:
        """Keep the bytes uint8 [frame_bytes] of a frame that is not in the file. OSError where the disk is full."""
        slot = len(self._maps)
        if slot == self._allocated:
            self._allocate(slot + 1)
        mapped = mmap.mmap(self._fd, self._slot_bytes, offset=slot * self._slot_bytes)
        torch.frombuffer(mapped, dtype=torch.uint8, count=self._frame_bytes).copy_(packed)
        self._maps[frame] = mapped

    def read(self, frame: int) -> Tensor:
        """Bytes uint8 [frame_bytes] of a frame: the mapped file itself, not to be changed."""
        return torch.frombuffer(self._maps[frame], dtype=torch.uint8, count=self._frame_bytes)

    def expect(self, frame: int) -> None:
        """Let the system read the frame ahead."""
        self._maps[frame].madvise(mmap.MADV_WILLNEED)

    def _allocate(self, slots: int) -> None:
        begin, end = self._allocated * self._slot_bytes, slots * self._slot_bytes
        room = os.statvfs(self._folder)
        free = room.f_bavail * room.f_frsize
        try:
            if end - begin > free:
                # Asking would fill the disk for everybody before it failed.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._fd, begin, end - begin)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self._folder}: no room for {end - begin:,} more bytes of history beside {begin:,}; {free:,} are "
                f"free ({error.strerror}). Fix: free space, set engine.bank.disk to a larger local disk, or store less "
                "with methods.<name>.history: int4",
            ) from error
        self._allocated = slots

"""Windows per second of a latent dataset against raw reads of the same bytes, cold and warm.

Both sides read the same random windows into buffers that they keep, with the same number of threads; the raw side
knows files and offsets beforehand and does nothing but open, seek and read. Cold means that the files are not in the
page cache (local files only).
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrag_ray.errors import UsageError
from lrag_ray.pipelines.dataset_import import import_dataset
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_files import file_name, tensor_bytes
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.thread_pool import thread_pool

FRAMES = 90
SHAPE = (16, 60, 104)
_MOST_NAMED = 8


class _Piece(NamedTuple):
    """Bytes of a window in one file."""

    storage: Storage
    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Reading:
    """One kind of reading: medians over the passes, which alternate between both sides."""

    windows_per_s: float
    raw_windows_per_s: float
    ratio: float
    mb_per_s: float


@dataclass(frozen=True)
class DatasetBench:
    """What was measured."""

    rollouts: int
    """Those that windows are drawn from."""
    left_out_count: int
    left_out: tuple[str, ...]
    """Rollouts that no window is drawn from, each with the reason: damaged ones, and those shorter than a window."""
    window: int
    readers: int
    windows_per_pass: int
    passes: int
    opened_s: float
    """Opening and planning the dataset."""
    warm: Reading
    cold: Reading | None
    """None where the files are not local."""
    peak_memory_mb: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench_dataset(
    uris: Sequence[str], *, window: int = 8, readers: int = 4, passes: int = 5, windows: int = 400
) -> DatasetBench:
    """Measure the dataset at one or more addresses. UsageError where no rollout is as long as a window."""
    began = time.perf_counter()
    data = LatentDataset.open(*uris)
    starts = data.frames - window + 1
    long = np.flatnonzero(starts > 0)
    opened_s = time.perf_counter() - began
    left_out = (*map(str, data.left_out), *_shorter(data, np.flatnonzero(starts <= 0), window))
    if not len(long):
        named = "".join(f"\nleft out: {each}" for each in left_out[:_MOST_NAMED])
        raise UsageError(f"no rollout has {counted(window, 'latent frame')}. Fix: a smaller --window{named}")
    random = np.random.default_rng(0)
    chosen = random.choice(long, windows, replace=len(long) < windows)
    places = [(int(i), int(random.integers(starts[i]))) for i in chosen]
    pieces = [_pieces(data, rollout, start, window) for rollout, start in places]
    size = window * data.form.frame_bytes

    buffers = threading.local()

    def buffer() -> Tensor:
        if not hasattr(buffers, "own"):
            buffers.own = torch.zeros((window, *data.shape), dtype=data.dtype)
        return buffers.own  # type: ignore[no-any-return]

    def ours(place: tuple[int, int]) -> None:
        data.read_into(place[0], place[1], buffer())

    def raw(each: list[_Piece]) -> None:
        view, at = buffer().view(torch.uint8).view(-1).numpy().data, 0
        for piece in each:
            _read_raw(piece, view[at : at + piece.size])
            at += piece.size

    def measure(before: Callable[[], None]) -> Reading:
        found = []
        for _ in range(passes):
            pair = []
            for work, items in ((ours, places), (raw, pieces)):
                before()
                started = time.perf_counter()
                with thread_pool(readers, "read") as threads:
                    for _ in threads.map(work, items):
                        pass
                pair.append(windows / (time.perf_counter() - started))
            found.append(pair)
        mine, theirs = (median(pair[side] for pair in found) for side in (0, 1))
        ratio = median(a / b for a, b in found)
        return Reading(round(mine, 1), round(theirs, 1), round(ratio, 3), round(mine * size / 1e6, 1))

    files = {piece.storage.full(piece.path) for each in pieces for piece in each if piece.storage.is_local}
    is_local = all(piece.storage.is_local for each in pieces for piece in each)
    measure(lambda: None) if passes > 1 else None
    warm = measure(lambda: None)
    return DatasetBench(
        rollouts=len(long),
        left_out_count=len(left_out),
        left_out=left_out,
        window=window,
        readers=readers,
        windows_per_pass=windows,
        passes=passes,
        opened_s=round(opened_s, 4),
        warm=warm,
        cold=measure(lambda: _forget(files)) if is_local else None,
        peak_memory_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    )


def make_dataset(folder: Path, rollouts: int) -> str:
    """A dataset of random latents at full size, 18 MB per rollout; returns its address."""
    source = folder / "latents"
    source.mkdir()
    values = torch.randn(FRAMES, *SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number in range(rollouts):
        values[0, 0, 0, 0] = number
        (source / f"{file_name(number)}.pt").write_bytes(tensor_bytes(values))
    import_dataset(str(source), str(folder / "dataset"))
    for path in source.iterdir():
        path.unlink()
    return str(folder / "dataset")


def _shorter(data: LatentDataset, rollouts: NDArray[np.int64], window: int) -> Iterator[str]:
    """Rollouts that have no window, by name."""
    for entry in map(data.entry, rollouts.tolist()):
        yield (
            f"{entry.run}/{entry.rollout}: has {counted(entry.frames, 'latent frame')}, fewer than a window of {window}"
        )


def _pieces(data: LatentDataset, rollout: int, start: int, length: int) -> list[_Piece]:
    storage, frame_bytes, found = data.storage_of(rollout), data.form.frame_bytes, []
    for part in data.parts(rollout):
        first, end = max(start, part.first_frame), min(start + length, part.first_frame + part.frames)
        if first < end:
            offset = part.offset + (first - part.first_frame) * frame_bytes
            found.append(_Piece(storage, part.path, offset, (end - first) * frame_bytes))
    return found


def _read_raw(piece: _Piece, view: memoryview) -> None:
    if not piece.storage.is_local:
        full, end = piece.storage.full(piece.path), piece.offset + piece.size
        view[:] = piece.storage.fs.cat_file(full, start=piece.offset, end=end)
        return
    with open(f"{piece.storage.root}/{piece.path}", "rb", buffering=0) as file:  # noqa: PTH123 - as fast as it gets
        file.seek(piece.offset)
        file.readinto(view)


def _forget(files: set[str]) -> None:
    """Take files out of the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

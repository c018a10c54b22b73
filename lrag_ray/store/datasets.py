"""Latent datasets: the rollouts of one or more runs, whose frames are read by byte range.

::

    data = LatentDataset.open("runs/corpus", "s3://bucket/more")
    data.rollouts[0].prompt
    data.read(0, start=12, length=8)   # [8, 16, 60, 104]

Opening reads the manifest of each index and nothing else. Order, split and windows need four columns of the index
(`keys`, `frames`), a read the places of 512 rollouts at a time, so memory is bounded by a few dozen bytes per rollout.
A dataset that grows meanwhile stays as it was when it was opened.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_index import (
    PLACE_COLUMNS,
    PLAN_COLUMNS,
    ROW_SCHEMA,
    IndexManifest,
    IndexRow,
    IndexSegment,
    LatentForm,
    SegmentFile,
    read_manifest,
)
from lrag_ray.store.dataset_rows import LeftOut, committed_rows
from lrag_ray.store.kept import Kept

_GROUPS_OF_PLACES = 512
"""Row groups whose places are kept: those of a quarter of a million rollouts, about 100 MB."""
_GROUPS_OF_ENTRIES = 16
_ROWS_OF_PARTS = 32_768
"""Rollouts whose parts are kept ready to be read: a third of the time of a window goes into looking them up."""

T = TypeVar("T")


class RolloutEntry(NamedTuple):
    """One rollout of a dataset."""

    run: str
    """Address of the run as it may be shown."""
    rollout: str
    """Folder of the rollout; the name of the file where it was imported."""
    key: str
    """Digest that fixes the split; the same in every dataset that holds the rollout, however far it was made."""
    frames: int
    """Latent frames."""
    prompt_index: int
    prompt_id: str
    prompt: str
    sample: int
    backbone: str
    method: str
    latents_digest: str
    """SHA-256 over the latent values in frame order."""


class PartPlace(NamedTuple):
    """A file with consecutive latent frames of a rollout."""

    path: str
    first_frame: int
    frames: int
    offset: int
    """First byte of the first frame."""
    size_bytes: int
    sha256: str


class LatentDataset:
    """Rollouts of one or more addresses, ordered by prompt, sample and key."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = list(sources)
        self._plan: _Plan | None = None
        self._lock = threading.Lock()
        forms = {source.uri: source.form for source in self._sources}
        if len(set(forms.values())) > 1:
            listed = ", ".join(f"{uri} holds {form}" for uri, form in forms.items())
            raise UsageError(
                f"these datasets cannot be joined, because their latents differ: {listed}. Fix: name those of one shape"
            )
        self.form = self._sources[0].form
        """Shape and dtype of every latent frame."""
        self.shape: tuple[int, int, int] = self.form.shape
        """(C, H, W) of every latent frame: (16, 60, 104) at 832x480."""
        self.dtype: torch.dtype = getattr(torch, self.form.dtype)
        """Of the latents as they are stored and read."""
        self.left_out: Sequence[LeftOut] = [
            LeftOut(f"{source.uri}/{path}", problem) for source in self._sources for path, problem in source.left_out
        ]
        """Committed latents of runs without an index that are not in the dataset, because something is damaged."""

    @classmethod
    def open(cls, uri: str, *more_uris: str, storage: StorageSection | None = None) -> LatentDataset:
        """The dataset at one or more addresses; a rollout that several of them hold counts once.

        Raises StorageError where there is no dataset or its index is damaged, and UsageError where it is empty, one
        address is named twice, or the latents of two addresses differ in shape or dtype.
        """
        places = [Storage(each, storage or StorageSection()) for each in (uri, *more_uris)]
        shown = [place.uri for place in places]
        if len(set(shown)) < len(shown):
            twice = next(one for one in shown if shown.count(one) > 1)
            raise UsageError(f"{twice} is named twice. Fix: name each dataset once")
        return cls([_open_source(place) for place in places])

    @property
    def uris(self) -> list[str]:
        """The addresses as they may be shown."""
        return [source.uri for source in self._sources]

    @property
    def rollouts(self) -> Sequence[RolloutEntry]:
        """The rollouts in order, each read when it is asked for."""
        return _Entries(self)

    @property
    def frames(self) -> NDArray[np.int64]:
        """Latent frames of each rollout, [rollouts]."""
        return self._planned().frames

    @property
    def keys(self) -> list[str]:
        """Key of each rollout."""
        keys: list[str] = self._planned().keys.to_pylist()
        return keys

    @property
    def duplicates(self) -> int:
        """Rollouts that are left out because an earlier address holds them too."""
        return self._planned().duplicates

    @property
    def digest(self) -> str:
        """SHA-256 over form, digests and lengths of all latents: equal for equal latents, wherever and however stored.

        It does not depend on the order of the addresses or on how the latents are cut into parts.
        """
        digests = self.columns(["latents_digest"])["latents_digest"]
        lines = sorted(f"{digest} {frames}" for digest, frames in zip(digests, self.frames.tolist(), strict=True))
        return hashlib.sha256("\n".join([str(self.form), *lines]).encode()).hexdigest()

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of the index (`ROW_SCHEMA`) in the order of the rollouts."""
        plan = self._planned()
        tables = [source.columns(names) for source in self._sources]
        starts = np.cumsum([0, *(table.num_rows for table in tables)])
        rows = pa.concat_tables(tables).take(pa.array(starts[plan.source] + plan.row))
        return {name: rows[name].to_pylist() for name in names}

    def read(self, rollout_index: int, start: int = 0, length: int | None = None) -> Tensor:
        """Latent frames `start` to `start + length` (None: to the end) of a rollout, [length, C, H, W], on the CPU.

        May be called from several threads. Raises IndexError for frames that the rollout does not have, StorageError
        for files that are missing or short.
        """
        frames = int(self._planned().frames[rollout_index])
        size = (frames - start if length is None else max(0, length), *self.form.shape)
        try:
            latents = torch.empty(size, dtype=self.dtype)
        except RuntimeError as error:
            raise StorageError(
                f"rollout {rollout_index} is {list(size)} {self.form.dtype}, which does not fit into memory. Fix: read "
                "fewer frames at a time; `lrag-ray dataset verify` says whether the index is right"
            ) from error
        self.read_into(rollout_index, start, latents)
        return latents

    def read_into(self, rollout_index: int, start: int, out: Tensor) -> None:
        """Fill `out` [length, C, H, W], contiguous on the CPU and of this dtype, with latent frames from `start` on.

        What a loop should use that keeps its buffers, such as a slot of a batch: nothing is allocated or copied. May be
        called from several threads. Errors are those of `read`.
        """
        plan = self._planned()
        frames, length = int(plan.frames[rollout_index]), out.shape[0]
        if not (start >= 0 and length > 0 and start + length <= frames):
            raise IndexError(
                f"rollout {rollout_index} has {counted(frames, 'latent frame')}, not {start} to {start + length}"
            )
        if out.shape[1:] != self.shape or out.dtype != self.dtype or not out.is_contiguous():
            raise ValueError(f"out is {list(out.shape)} {out.dtype}, expected contiguous frames {self.form}")
        view = memoryview((ctypes.c_char * (out.numel() * out.element_size())).from_address(out.data_ptr())).cast("B")
        self._sources[plan.source[rollout_index]].read_into(int(plan.row[rollout_index]), start, length, view)

    def parts(self, rollout_index: int) -> list[PartPlace]:
        """The files of a rollout."""
        plan = self._planned()
        row = self._sources[plan.source[rollout_index]].row(int(plan.row[rollout_index]))
        return [
            PartPlace(*each)
            for each in zip(
                row.part,
                row.part_first_frame,
                row.part_frames,
                row.part_offset,
                row.part_bytes,
                row.part_sha256,
                strict=True,
            )
        ]

    def storage_of(self, rollout_index: int) -> Storage:
        """Where the files of a rollout are."""
        return self._sources[int(self._planned().source[rollout_index])].storage

    def __len__(self) -> int:
        """Rollouts."""
        return len(self._planned().frames)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def entry(self, rollout_index: int) -> RolloutEntry:
        """One rollout."""
        plan = self._planned()
        source = self._sources[plan.source[rollout_index]]
        row = source.row(int(plan.row[rollout_index]))
        return RolloutEntry(source.uri, **{name: getattr(row, name) for name in RolloutEntry._fields[1:]})

    def _planned(self) -> _Plan:
        if self._plan is None:
            with self._lock:
                if self._plan is None:
                    self._plan = _make_plan(self._sources)
        return self._plan


class _Entries(Sequence[RolloutEntry]):
    def __init__(self, data: LatentDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> RolloutEntry: ...

    @overload
    def __getitem__(self, index: slice) -> list[RolloutEntry]: ...

    def __getitem__(self, index: int | slice) -> RolloutEntry | list[RolloutEntry]:
        if isinstance(index, slice):
            return [self._data.entry(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"the dataset has {counted(len(self), 'rollout')}, not one with index {index}")
        return self._data.entry(index % len(self))

    def __iter__(self) -> Iterator[RolloutEntry]:
        return (self._data.entry(index) for index in range(len(self)))


class _Plan(NamedTuple):
    """The order of a dataset; arrays are [rollouts]."""

    source: NDArray[np.int64]
    row: NDArray[np.int64]
    """Within the source."""
    frames: NDArray[np.int64]
    keys: pa.Array
    duplicates: int


def _make_plan(sources: Sequence[_Source]) -> _Plan:
    tables = []
    for number, source in enumerate(sources):
        table = source.columns(PLAN_COLUMNS)
        rows = pa.array(np.arange(table.num_rows))
        tables.append(
            table.append_column("source", pa.array(np.full(table.num_rows, number))).append_column("row", rows)
        )
    joined = pa.concat_tables(tables)
    duplicates = 0
    if len(sources) > 1:
        first = joined.group_by("key").aggregate([("source", "min")])
        joined = joined.join(first, "key")
        kept = joined.filter(pc.equal(joined["source"], joined["source_min"]))
        duplicates = joined.num_rows - kept.num_rows
        joined = kept
    order = [(name, "ascending") for name in ("prompt_index", "sample", "key", "source", "row")]
    joined = joined.sort_by(order)
    return _Plan(
        source=joined["source"].to_numpy().astype(np.int64),
        row=joined["row"].to_numpy().astype(np.int64),
        frames=joined["frames"].to_numpy().astype(np.int64),
        keys=joined["key"].combine_chunks(),
        duplicates=duplicates,
    )


def _open_source(storage: Storage) -> _Source:
    manifest = read_manifest(storage)
    if manifest is not None and manifest.form is not None:
        return _Source(storage, manifest.form, _IndexRows(storage, manifest))
    table, form, left_out = committed_rows(storage)
    if form is None and left_out:
        raise StorageError(
            f"{storage.uri} holds no latents that are whole ({counted(len(left_out), 'commit')} left out; "
            f"{left_out[0]}). "
            "Fix: the command that made the run makes them again"
        )
    if form is None:
        raise UsageError(f"{storage.uri} holds no finished rollout yet. Fix: wait for the first one, or run it again")
    return _Source(storage, form, _TableRows(table), left_out)


class _Source:
    """The rollouts of one address."""

    def __init__(
        self,
        storage: Storage,
        form: LatentForm,
        rows: _IndexRows | _TableRows,
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        self.storage = storage
        self.left_out = left_out
        self.form = form
        self.uri = storage.uri
        self._frame_bytes = form.frame_bytes
        self._rows = rows
        self._places: Kept[_Places] = Kept(_GROUPS_OF_PLACES)
        self._parts: Kept[list[tuple[str, int, int, int]]] = Kept(_ROWS_OF_PARTS)
        self._entries: Kept[pa.Table] = Kept(_GROUPS_OF_ENTRIES)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Columns of all rows."""
        return self._rows.columns(names)

    def row(self, row: int) -> IndexRow:
        """All columns of a row."""
        table, at = self._rows.group_of(row, ROW_SCHEMA.names, self._entries, lambda table: table)
        return IndexRow(**table.slice(at, 1).to_pylist()[0])

    def read_into(self, row: int, start: int, length: int, view: memoryview) -> None:
        """Fill `view` with frames of a row."""
        frame_bytes, end, done = self._frame_bytes, start + length, 0
        for path, part_start, frames, offset in self._parts.get(row, partial(self._parts_of, row)):
            first, stop = max(start, part_start), min(end, part_start + frames)
            if first >= stop:
                continue
            size = (stop - first) * frame_bytes
            self._read_piece(path, offset + (first - part_start) * frame_bytes, view[done : done + size])
            done += size
        if done < len(view):
            raise StorageError(f"{self.uri}: the index has no part for frames {start} to {end} of row {row}")

    def _parts_of(self, row: int) -> list[tuple[str, int, int, int]]:
        """Path, first frame, frames and offset of each part of a row."""
        places, at = self._rows.group_of(row, PLACE_COLUMNS, self._places, _Places)
        span = slice(places.bounds[at], places.bounds[at + 1])
        return list(
            zip(
                places.part[span].to_pylist(),
                places.first_frame[span],
                places.frames[span],
                places.offset[span],
                strict=True,
            )
        )

    def _read_piece(self, path: str, offset: int, view: memoryview) -> None:
        try:
            got = self.storage.read_into(path, offset, view)
        except FileNotFoundError:
            reason = "is missing"
        else:
            if got == len(view):
                return
            reason = f"ends {len(view) - got} bytes before the latents that it should hold"
        raise StorageError(
            f"{self.uri}/{path} {reason}. Fix: `lrag-ray dataset verify` lists what is damaged; the command that made "
            "the dataset makes it again"
        )


class _Places:
    """Where the frames of a row group are, as plain arrays."""

    def __init__(self, table: pa.Table) -> None:
        part = table["part"].combine_chunks()
        self.part = part.flatten()
        self.bounds: list[int] = np.concatenate([[0], np.cumsum(pc.list_value_length(part).to_numpy())]).tolist()
        self.first_frame, self.frames, self.offset = (
            table[name].combine_chunks().flatten().to_pylist()
            for name in ("part_first_frame", "part_frames", "part_offset")
        )
        if not len(self.part) == len(self.first_frame) == len(self.frames) == len(self.offset):
            raise StorageError("the index is damaged: its parts and their offsets differ in number")


class _TableRows:
    """Rows in memory, of a run without an index."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Columns of all rows."""
        return self._table.select(list(names))

    def group_of(self, row: int, names: Sequence[str], kept: Kept[T], make: Callable[[pa.Table], T]) -> tuple[T, int]:
        """All rows are one group."""
        return kept.get(0, lambda: make(self._table.select(list(names)))), row


class _IndexRows:
    """Rows of an index, as its manifest was when it was opened."""

    def __init__(self, storage: Storage, manifest: IndexManifest) -> None:
        self._storage = storage
        self._manifest = manifest
        self._rollouts = manifest.rollouts
        self._files: Kept[SegmentFile] = Kept(64)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Columns of all rows of the snapshot."""

        def read() -> pa.Table:
            tables = [self._file(segment).read(names) for segment in self._manifest.segments]
            return pa.concat_tables(tables).slice(0, self._rollouts)

        return self._current(read)

    def group_of(self, row: int, names: Sequence[str], kept: Kept[T], make: Callable[[pa.Table], T]) -> tuple[T, int]:
        """What `make` makes of the row group that holds `row`, and the row's place in it."""

        def read(segment: IndexSegment, group: int) -> T:
            return make(self._file(segment).read_group(group, names))

        def look() -> tuple[T, int]:
            at = row
            for segment in self._manifest.segments:
                if at < segment.rollouts:
                    ends = self._file(segment).group_ends
                    group = bisect_right(ends, at)
                    value = kept.get((segment.path, group), partial(read, segment, group))
                    return value, at - (ends[group - 1] if group else 0)
                at -= segment.rollouts
            raise IndexError(f"the index has no row {row}")

        return self._current(look)

    def _file(self, segment: IndexSegment) -> SegmentFile:
        return self._files.get(segment.path, lambda: SegmentFile(self._storage, segment))

    def _current(self, read: Callable[[], T]) -> T:
        """The result of `read`; where a segment was merged and removed, of another look at the index."""
        try:
            return read()
        except FileNotFoundError:
            manifest = read_manifest(self._storage)
            if (
                manifest is None
                or manifest.generation != self._manifest.generation
                or manifest.rollouts < self._rollouts
            ):
                raise StorageError(
                    f"{self._storage.uri}: the index was made anew since the dataset was opened. Fix: open it again"
                ) from None
            # Rows keep their numbers while the index grows.
            self._manifest = manifest
            return read()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": Kept(64)}

"""The index of a latent dataset: which frames of which rollout are stored at which bytes of which file.

::

    dataset/
      index.json                       the segments that count, in order (`IndexManifest`), replaced as a whole
      index/<rollouts>-<random>.parquet one row per rollout (`ROW_SCHEMA`); written once, never changed

A reader sees the dataset as it was when it read ``index.json``: a valid one at any moment while generation goes on.
Small segments are merged into larger ones; those that were merged stay until `lrag-ray gc` removes them, because a
reader may still use them.

The index says nothing that the commits do not say: `rows_of` makes its rows from them.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from lrag_ray.errors import StorageError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.parquet import written_out_bytes
from lrag_ray.store.parts import BrokenPartError
from lrag_ray.store.records import Count, FileRecord, Record, why_not


class DamagedIndexError(StorageError):
    """The index is not what it should be; it can be made again."""


FOLDER = "dataset"
MANIFEST_FILE = f"{FOLDER}/index.json"
SEGMENT_PREFIX = f"{FOLDER}/index/"
FORMAT_VERSION = 1

ROWS_PER_GROUP = 512
"""Rows that a reader fetches at a time; a location takes about 100 bytes."""

PLAN_COLUMNS = ("key", "prompt_index", "sample", "frames")
"""What order, split and windows need."""
PLACE_COLUMNS = ("part", "part_first_frame", "part_frames", "part_offset")
"""What reading frames needs."""

ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_index", pa.int64()),
        ("sample", pa.int64()),
        ("frames", pa.int32()),
        ("part", pa.list_(pa.string())),
        ("part_first_frame", pa.list_(pa.int32())),
        ("part_frames", pa.list_(pa.int32())),
        ("part_offset", pa.list_(pa.int64())),
        ("part_bytes", pa.list_(pa.int64())),
        ("part_sha256", pa.list_(pa.string())),
        ("rollout", pa.string()),
        ("backbone", pa.string()),
        ("method", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("latents_digest", pa.string()),
    ]
)
"""Columns of a segment: the fields of `IndexRow`; of each part its file, frames, offset of the first latent value,
size of the file and checksum."""

_LEAST = {
    "prompt_index": 0,
    "sample": 0,
    "frames": 1,
    "part_first_frame": 0,
    "part_frames": 1,
    "part_offset": 64,  # no header of four-dimensional latents is shorter
    "part_bytes": 1,
}
"""Smallest values of columns."""
_LONGEST = {"key": 64, "latents_digest": 64, "backbone": 1000, "method": 1000, "prompt_id": 1000}
"""Characters of texts, as records of exported latents allow them."""
_TEXTS = [field.name for field in ROW_SCHEMA if field.type == pa.string()]
_TEXTS += [f"{field.name}.list.element" for field in ROW_SCHEMA if field.type == pa.list_(pa.string())]
_AS_READ = {pa.string(): pa.dictionary(pa.int32(), pa.string())}
_AS_READ[pa.list_(pa.string())] = pa.list_(_AS_READ[pa.string()])
_READ_SCHEMA = pa.schema([(field.name, _AS_READ.get(field.type, field.type)) for field in ROW_SCHEMA])
"""A text that is repeated a million times is kept once until it is known what all of them take."""
_MOST_VALUES = ROWS_PER_GROUP * 2048
"""Parts of the rollouts of a row group."""
_MOST_GROUP_BYTES = 64 * 2**20
_MOST_BYTES = 2**30
"""Of the columns that are read at once: those of half a million rollouts with long prompts."""

_DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
"""Of safetensors: torch's name and bytes per value."""
_HEAD_BYTES = 4096
"""Of a part, read for its header; a header that is longer takes a second read."""
_MOST_HEADER_BYTES = 1 << 24
MOST_SIZE = 2**16
"""Channels, rows or columns of a latent; `EncoderConfig` takes no more."""


class LatentForm(Record):
    """What one latent frame of a dataset is."""

    channels: int = Field(ge=1, le=MOST_SIZE)
    height: int = Field(ge=1, le=MOST_SIZE)
    width: int = Field(ge=1, le=MOST_SIZE)
    dtype: Annotated[str, Field(pattern="^(bfloat16|float16|float32)$")]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    @property
    def frame_bytes(self) -> int:
        """Bytes of one latent frame."""
        return prod(self.shape) * next(size for name, size in _DTYPES.values() if name == self.dtype)

    def __str__(self) -> str:
        return f"[{self.channels}, {self.height}, {self.width}] {self.dtype}"


class IndexRow(NamedTuple):
    """One rollout of a dataset: the columns of a segment."""

    key: str
    """Fixes the split: the rollout key of a run, or the digest of an imported latent."""
    prompt_index: int
    sample: int
    frames: int
    part: list[str]
    part_first_frame: list[int]
    part_frames: list[int]
    part_offset: list[int]
    part_bytes: list[int]
    part_sha256: list[str]
    rollout: str
    """Folder of the rollout; the name of the file where it was imported."""
    backbone: str
    method: str
    prompt_id: str
    prompt: str
    latents_digest: str
    """SHA-256 over the latent values in frame order."""


class FormedRow(NamedTuple):
    """A row and what its frames are."""

    row: IndexRow
    form: LatentForm


class IndexSegment(FileRecord):
    """One parquet file of the index."""

    rollouts: Annotated[int, Field(ge=1, lt=2**40)]
    frames: Count
    """Of all its rollouts."""
    shortest: Count
    """Frames of its shortest rollout."""


class IndexManifest(Record):
    """``dataset/index.json``: what the dataset holds now."""

    format_version: int = FORMAT_VERSION
    generation: str
    """Changes when the index is made anew. While it stays, rollouts are only added, and each keeps its row number."""
    form: LatentForm | None = None
    """Of every latent; None while there is none."""
    segments: list[IndexSegment] = Field(default_factory=list)

    @property
    def rollouts(self) -> int:
        """Rollouts of all segments."""
        return sum(segment.rollouts for segment in self.segments)

    @property
    def frames(self) -> int:
        """Latent frames of all rollouts."""
        return sum(segment.frames for segment in self.segments)


def read_manifest(storage: Storage) -> IndexManifest | None:
    """What the index at an address holds, or None where there is no index. StorageError where it is damaged."""
    try:
        data = storage.read_bytes(MANIFEST_FILE)
    except FileNotFoundError:
        return None
    try:
        manifest = IndexManifest.opened(data)
    except ValueError as error:
        reason = why_not(error)
    else:
        paths = [segment.path for segment in manifest.segments]
        misplaced = [path for path in paths if not path.startswith(SEGMENT_PREFIX)]
        twice = len(set(paths)) < len(paths)
        if manifest.format_version == FORMAT_VERSION and not misplaced and not twice:
            if manifest.form is not None or not manifest.segments:
                return manifest
            reason = "it names segments and no shape"
        elif twice:
            reason = "it names a segment twice"
        elif misplaced:
            reason = f"it names {misplaced[0]!r}, which is not in {SEGMENT_PREFIX}"
        else:
            reason = f"its format_version is {manifest.format_version}"
    raise DamagedIndexError(
        f"{storage.uri}/{MANIFEST_FILE} is not an index of format {FORMAT_VERSION} ({reason}). Fix: delete it; the "
        "command that made the dataset makes it again from the commits"
    )


class IndexWriter:
    """Adds rollouts to the index of one address. One writer at a time: it works under the lease of the run."""

    def __init__(self, storage: Storage, manifest: IndexManifest | None = None) -> None:
        """Continue `manifest`, which is what `storage` holds; without it the first `add` makes the index anew."""
        self._storage = storage
        self.manifest = manifest or IndexManifest(generation=secrets.token_hex(8))

    def add(self, rows: Sequence[FormedRow]) -> None:
        """Add rollouts, and merge the last segments where they are small; StorageError for a latent of another form."""
        if not rows:
            return
        form = self.manifest.form or rows[0].form
        for row, found in rows:
            if found != form:
                raise StorageError(
                    f"{self._storage.uri}/{row.rollout} holds latents {found}, the others are {form}: a dataset has "
                    "one shape. Fix: put backbones with other latents into a run of their own"
                )
        table = table_of([row for row, _ in rows])
        kept = list(self.manifest.segments)
        # As many segments as the binary digits of their rollouts: each row is written again only a few times.
        while kept and kept[-1].rollouts <= 2 * table.num_rows:
            merged = SegmentFile(self._storage, kept.pop()).read(ROW_SCHEMA.names)
            table = pa.concat_tables([merged, table])
        segment = self._write(table)
        self.manifest = self.manifest.model_copy(update={"form": form, "segments": [*kept, segment]})
        self.write_manifest()

    def write_manifest(self) -> None:
        """Let readers see what was added."""
        self._storage.write(MANIFEST_FILE, self.manifest.sealed())

    def _write(self, table: pa.Table) -> IndexSegment:
        sink = io.BytesIO()
        pq.write_table(
            table,
            sink,
            row_group_size=ROWS_PER_GROUP,
            compression="zstd",
            use_dictionary=["backbone", "method"],
            write_statistics=False,
        )
        path = f"{SEGMENT_PREFIX}{table.num_rows}-{secrets.token_hex(8)}.parquet"
        self._storage.write(path, sink.getvalue())
        frames = table.column("frames").to_pylist()
        return IndexSegment(
            path=path,
            size_bytes=len(sink.getvalue()),
            sha256=hashlib.sha256(sink.getvalue()).hexdigest(),
            rollouts=table.num_rows,
            frames=sum(frames),
            shortest=min(frames),
        )


def table_of(rows: Sequence[IndexRow]) -> pa.Table:
    """Rows as a segment holds them."""
    columns = {name: [getattr(row, name) for row in rows] for name in ROW_SCHEMA.names}
    return pa.table(columns, schema=ROW_SCHEMA)


class RangeFile(io.RawIOBase):
    """A file on storage that is read by byte range, for readers that seek."""

    def __init__(self, storage: Storage, path: str, size_bytes: int) -> None:
        super().__init__()
        self._storage, self._path, self._size = storage, path, size_bytes
        self._at = 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a byte."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from here."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self._size - self._at))]
        got = self._storage.read_into(self._path, self._at, view) if len(view) else 0
        self._at += got
        return got


class SegmentFile:
    """A segment whose columns are read by byte range. Several threads may read; they take turns.

    It may come from a stranger, so what the file would become is known before it does, as in `parquet`.
    """

    def __init__(self, storage: Storage, segment: IndexSegment) -> None:
        """FileNotFoundError where the segment is gone; StorageError where it is not what the manifest says."""
        self._name = f"{storage.uri}/{segment.path}"
        # A ParquetFile over a Python file hangs where two threads read at once.
        self._lock = threading.Lock()
        self._file = self._checked(
            lambda: pq.ParquetFile(
                pa.PythonFile(RangeFile(storage, segment.path, segment.size_bytes)), read_dictionary=_TEXTS
            )
        )
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.group_ends = list(accumulate(group.num_rows for group in groups))
        """Rows before the end of each row group."""
        found = metadata.num_rows
        if found != segment.rollouts or not self._file.schema_arrow.equals(_READ_SCHEMA):
            raise self._damaged(f"{found} rows or other columns")
        for group in groups:
            columns = [group.column(i) for i in range(group.num_columns)]
            if (
                group.num_rows > ROWS_PER_GROUP
                or any(column.num_values > _MOST_VALUES for column in columns)
                or sum(column.total_uncompressed_size for column in columns) > _MOST_GROUP_BYTES
            ):
                raise self._damaged(f"it claims more than {ROWS_PER_GROUP} rollouts have")

    def read(self, columns: Sequence[str]) -> pa.Table:
        """These columns of all rows."""
        return self._checked(lambda: self._table(range(len(self.group_ends)), columns, _MOST_BYTES))

    def read_group(self, group: int, columns: Sequence[str]) -> pa.Table:
        """These columns of the rows of one row group."""
        return self._checked(lambda: self._table([group], columns, _MOST_GROUP_BYTES))

    def _table(self, groups: Iterable[int], columns: Sequence[str], most_bytes: int) -> pa.Table:
        schema = pa.schema([ROW_SCHEMA.field(name) for name in columns])
        made, held = [schema.empty_table()], 0
        for group in groups:
            table = self._file.read_row_group(group, columns=list(columns), use_threads=False).select(columns)
            table.validate(full=True)
            held += sum(written_out_bytes(column) for column in table.columns)
            if held > most_bytes:
                raise ValueError(f"its values take more than {most_bytes >> 20} MiB")
            made.append(table.cast(schema))
            _refuse_impossible(made[-1])
        return pa.concat_tables(made)

    def _checked(self, read: Callable[[], Any]) -> Any:
        try:
            with self._lock:
                return read()
        except (FileNotFoundError, StorageError):
            raise
        except KeyError as error:
            # What is said of a column of `read_dictionary` that the file lacks.
            raise self._damaged(f"it has no column {error}") from error
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> DamagedIndexError:
        return DamagedIndexError(
            f"{self._name} is damaged ({reason}). Fix: delete {MANIFEST_FILE} beside it; the command that made the "
            "dataset makes the index again"
        )


def _refuse_impossible(table: pa.Table) -> None:
    """ValueError for rows that no writer makes: values that are missing, too small or too long, lists that differ."""
    parts = None
    for name, column in zip(table.column_names, table.columns, strict=True):
        is_list = pa.types.is_list(column.type)
        values = pc.list_flatten(column) if is_list else column
        if column.null_count or values.null_count:
            raise ValueError(f"its column {name} lacks values")
        if name in _LEAST and len(values) and (least := pc.min(values).as_py()) < _LEAST[name]:
            raise ValueError(f"its column {name} holds {least}")
        if name in _LONGEST and len(values) and (most := pc.max(pc.utf8_length(values)).as_py()) > _LONGEST[name]:
            raise ValueError(f"its column {name} holds a text of {most:,} characters")
        if is_list:
            lengths = pc.list_value_length(column)
            if not pc.all(pc.greater(lengths, 0)).as_py() or not (parts is None or lengths.equals(parts)):
                raise ValueError("its lists of parts are empty or differ in length")
            parts = lengths


class PartLayout(NamedTuple):
    """Where the latents of a part are in its file."""

    form: LatentForm
    offset: int
    """First byte of the first frame."""


def part_layout(storage: Storage, path: str, size_bytes: int, frames: int) -> PartLayout:
    """Read the header of a part. BrokenPartError unless it holds `frames` latent frames within `size_bytes`."""
    try:
        head = storage.read_range(path, 0, min(_HEAD_BYTES, size_bytes))
    except FileNotFoundError:
        raise BrokenPartError(f"{path} is missing") from None
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else _MOST_HEADER_BYTES
    if 8 + length > min(size_bytes, _MOST_HEADER_BYTES):
        raise BrokenPartError(f"{path} is not a safetensors file")
    if 8 + length > len(head):
        head += storage.read_range(path, len(head), 8 + length)
    try:
        entry = json.loads(head[8 : 8 + length])["latents"]
        dtype, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        name, value_bytes = _DTYPES[dtype]
        count, channels, height, width = (int(size) for size in shape)
        form = LatentForm(channels=channels, height=height, width=width, dtype=name)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = why_not(error) if isinstance(error, ValueError) else error
        raise BrokenPartError(f"{path} does not hold latent frames: {reason}") from error
    if count != frames or end - first != prod(shape) * value_bytes or not 0 <= first <= end <= size_bytes - 8 - length:
        raise BrokenPartError(f"{path} does not hold {counted(frames, 'latent frame')}")
    return PartLayout(form, 8 + length + first)

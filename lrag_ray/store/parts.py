"""Latent parts: what a rollout has finished so far, on storage.

A part is a safetensors file of consecutive latent frames (and, per block, what replay cannot rebuild), a parquet
file with the trace rows of the same blocks, and a record that names both with sizes and checksums. Equal rollouts
write equal bytes: nothing of the attempt, the time or the machine is in the two files.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lrag_ray.context.trace import TraceRow
from lrag_ray.store.address import Storage
from lrag_ray.store.parquet import read_parquet
from lrag_ray.store.records import FileRecord, LatentPart, PartRecord
from lrag_ray.wan.tensor_file import NotTensorsError, tensors_in

TRACE_SCHEMA = pa.schema(
    [
        ("block", pa.int32()),
        ("layer", pa.int16()),
        ("kind", pa.string()),
        ("frame", pa.int32()),
        ("temporal_index", pa.int32()),
        ("tokens", pa.int32()),
        ("similarity", pa.float32()),
        ("heads", pa.list_(pa.int16())),
        ("window", pa.int32()),
        ("clean", pa.bool_()),
        ("timestep", pa.float32()),
    ]
)
"""Columns of a trace part: the fields of `TraceRow`."""
OPTIONAL_COLUMNS = ("heads", "window", "clean", "timestep")
"""Those that only some methods fill: a file has the ones that any of its rows does."""
_STORED_AS = (torch.bfloat16, torch.float16, torch.float32)
_MOST_DIGITS = 9
"""Of the block in the name of a state."""


class FinishedBlock(NamedTuple):
    """One block of one rollout, in host memory."""

    block: int
    """Block index, from 0."""
    latents: Tensor
    """Clean latents [frames_per_block, C, H, W] on the CPU."""
    trace: list[TraceRow]
    """Rows attended to."""
    state: dict[str, Tensor]
    """What replay cannot rebuild; empty for most methods."""


class BrokenPartError(Exception):
    """A part's files are missing, short or corrupt; the message says which and how."""


class StoredPart(NamedTuple):
    """A part that was read back and found whole."""

    record: PartRecord
    blocks: list[FinishedBlock]


class PartChain(NamedTuple):
    """The unbroken sequence of whole parts from frame 0 on."""

    parts: list[StoredPart]
    broken: list[str]
    """What was wrong with the parts that were not taken, one line each."""

    @property
    def end_frame(self) -> int:
        """Latent frames that need not be generated again."""
        return self.parts[-1].record.end_frame if self.parts else 0


def value_bytes(latents: Tensor) -> bytes:
    """Values of latents in memory order, for digests."""
    return latents.contiguous().view(torch.uint8).numpy().tobytes()


def write_part(
    storage: Storage, folder: str, blocks: Sequence[FinishedBlock], *, rollout_key: str, device_kind: str
) -> PartRecord:
    """Write consecutive `blocks` as one part into `folder` (``…/attempt-<id>``), its record last."""
    frames_per_block = blocks[0].latents.shape[0]
    first = blocks[0].block * frames_per_block
    frames = sum(block.latents.shape[0] for block in blocks)
    name = f"{folder}/part-{first:05d}-{first + frames:05d}"
    latents = _write_file(storage, f"{name}.safetensors", latent_bytes(blocks))
    trace = _write_file(storage, f"{name}.trace.parquet", trace_bytes(blocks))
    record = PartRecord(
        rollout_key=rollout_key,
        attempt=folder.rsplit("/attempt-", 1)[-1],
        latents=LatentPart(**latents.model_dump(), first_frame=first, frames=frames),
        trace=trace,
        device_kind=device_kind,
    )
    storage.write(f"{name}.json", record.sealed())
    return record


def read_part(storage: Storage, record: PartRecord, frames_per_block: int) -> StoredPart:
    """Read a part back; BrokenPartError unless both files are exactly what the record says."""
    tensors = _read_tensors(storage, record.latents)
    latents = tensors["latents"]
    if record.first_frame % frames_per_block or record.latents.frames % frames_per_block:
        raise BrokenPartError(f"{record.latents.path} does not hold whole blocks of {frames_per_block} latent frames")
    first_block = record.first_frame // frames_per_block
    trace: dict[int, list[TraceRow]] = {}
    for row in read_traces(storage, [record.trace]):
        trace.setdefault(row.block, []).append(row)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("state."):
            _, block, name = [*key.split(".", 2), ""][:3]
            if not (block.isascii() and block.isdecimal() and len(block) <= _MOST_DIGITS):
                raise BrokenPartError(f"{record.latents.path} holds {key[:80]!r}, which is no block's")
            state.setdefault(int(block), {})[name] = value
    blocks = [
        FinishedBlock(index, chunk, trace.get(index, []), state.get(index, {}))
        for index, chunk in enumerate(latents.split(frames_per_block), start=first_block)
    ]
    return StoredPart(record, blocks)


def read_latents(storage: Storage, part: LatentPart) -> Tensor:
    """Latents [frames, C, H, W] of a part; BrokenPartError unless its file is exactly what the record says."""
    return _read_tensors(storage, part)["latents"]


def read_chain(
    storage: Storage, candidates: Sequence[PartRecord], *, rollout_key: str, frames_per_block: int
) -> PartChain:
    """The longest unbroken chain of whole parts with this key; parts of any attempt may follow one another.

    At each frame the part that reaches furthest is tried first; a broken one is left for the next and reported.
    """
    usable = [record for record in candidates if record.rollout_key == rollout_key]
    usable.sort(key=lambda record: (record.end_frame, record.latents.path), reverse=True)
    chain: list[StoredPart] = []
    broken: list[str] = []
    end = 0
    while True:
        for record in usable:
            if record.first_frame != end or record.end_frame <= end:
                continue
            try:
                chain.append(read_part(storage, record, frames_per_block))
            except BrokenPartError as error:
                broken.append(str(error))
                continue
            break
        else:
            return PartChain(chain, broken)
        end = chain[-1].record.end_frame


def read_trace_table(storage: Storage, parts: Sequence[FileRecord]) -> pa.Table:
    """Columns of `TRACE_SCHEMA` of trace parts; BrokenPartError unless their files are exactly what was recorded."""
    tables = []
    for part in parts:
        tables.append(_trace_table(_read_checked(storage, part), part.path))
    return pa.concat_tables(tables) if tables else TRACE_SCHEMA.empty_table()


def read_traces(storage: Storage, parts: Sequence[FileRecord]) -> list[TraceRow]:
    """Rows of trace parts; BrokenPartError unless their files are exactly what was recorded."""
    return _rows(read_trace_table(storage, parts))


def read_trace(data: bytes) -> list[TraceRow]:
    """Rows in the bytes of a trace part; BrokenPartError where it is none."""
    return _rows(_trace_table(data, "this"))


def _trace_table(data: bytes, path: str) -> pa.Table:
    try:
        return read_parquet(data, TRACE_SCHEMA, optional=OPTIONAL_COLUMNS)
    except pa.ArrowException as error:
        raise BrokenPartError(f"{path} is not a trace part: {error}") from error


def _rows(table: pa.Table) -> list[TraceRow]:
    rows = table.to_pylist()
    return [TraceRow(**{**row, "heads": None if row["heads"] is None else tuple(row["heads"])}) for row in rows]


def latent_bytes(blocks: Sequence[FinishedBlock]) -> bytes:
    """The latent file of a part: equal blocks give equal bytes."""
    tensors = {"latents": torch.cat([block.latents for block in blocks]).contiguous()}
    for block in blocks:
        for key, value in block.state.items():
            tensors[f"state.{block.block}.{key}"] = value.cpu().contiguous()
    return bytes(save_safetensors(tensors))


def trace_bytes(blocks: Sequence[FinishedBlock]) -> bytes:
    """The trace file of a part: equal blocks give equal bytes."""
    rows = [row for block in blocks for row in block.trace]
    absent = {name for name in OPTIONAL_COLUMNS if all(getattr(row, name) is None for row in rows)}
    schema = pa.schema([field for field in TRACE_SCHEMA if field.name not in absent])
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    sink = io.BytesIO()
    # Without a seal: commits name its checksum, and equal rollouts write equal bytes in every version.
    pq.write_table(pa.table(columns, schema=schema), sink)
    return sink.getvalue()


def latent_tensors(data: bytes, frames: int) -> dict[str, Tensor]:
    """The tensors in the bytes of a latent part. NotTensorsError unless `latents` are [frames, C, H, W] of a float."""
    tensors = tensors_in(data)
    latents = tensors.get("latents")
    if latents is None or latents.dim() != 4 or latents.shape[0] != frames or latents.dtype not in _STORED_AS:
        raise NotTensorsError(f"it does not hold {frames} latent frames")
    return tensors


def _read_tensors(storage: Storage, part: LatentPart) -> dict[str, Tensor]:
    try:
        return latent_tensors(_read_checked(storage, part), part.frames)
    except NotTensorsError as error:
        raise BrokenPartError(f"{part.path} is not a latent part: {error}") from error


def _write_file(storage: Storage, path: str, data: bytes) -> FileRecord:
    storage.write(path, data)
    return FileRecord(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read_checked(storage: Storage, record: FileRecord) -> bytes:
    try:
        data = storage.read_bytes(record.path)
    except FileNotFoundError:
        raise BrokenPartError(f"{record.path} is missing") from None
    if len(data) != record.size_bytes:
        raise BrokenPartError(f"{record.path} has {len(data)} bytes instead of {record.size_bytes}")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BrokenPartError(f"{record.path} does not have the recorded checksum")
    return data

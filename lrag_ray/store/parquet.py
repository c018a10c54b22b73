"""Parquet files of a run: written with a seal, read as files that may come from strangers.

A file of a few kilobytes can claim rows that fill the memory: repeated values cost next to nothing in it. So what the
file would become is known before any value is taken out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Container, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lrag_ray.store.seal import PARQUET_BLANK, PARQUET_KEY, check_parquet, is_sealed_parquet, sealed_parquet

MOST_ROWS = 2_000_000
"""In one file: ten times a part of a rollout whose method chooses per layer."""
_PLACE, _SERIES = "place", "series"
_ROWS_AT_ONCE = 65_536
MOST_BYTES = 256 * 2**20
"""Of all values of one file in memory."""


def write_parquet(table: pa.Table, path: str = "", ends: Sequence[str] = ()) -> bytes:
    """`table` as a sealed parquet file that knows its place.

    `path` is where it is going to be, relative to its storage; `ends` are names of the files beside it that are there
    because it is the last of a series.
    """
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_PLACE: path, _SERIES: json.dumps(sorted(ends)), PARQUET_KEY: PARQUET_BLANK})
    return sealed_parquet(sink.getvalue())


def damage_of(data: bytes, path: str, beside: Container[str]) -> str | None:
    """What is wrong with the sealed parquet file at `path`, or None. `beside` are the paths of all stored files."""
    try:
        check_parquet(data)
        found = {
            key.decode(): value.decode() for key, value in (pq.read_metadata(io.BytesIO(data)).metadata or {}).items()
        }
        place, series = found.get(_PLACE, ""), json.loads(found.get(_SERIES, "[]"))
        missing = [name for name in series if f"{path.rpartition('/')[0]}/{name}" not in beside]
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        return f"is not a readable parquet file: {error}"
    if not is_sealed_parquet(data):
        # Another table in its place, such as a trace, is whole in itself.
        return "has no seal"
    if place and place != path:
        return f"is the file of {place}"
    return f"ends a series of which {missing[0]} is missing" if missing else None


def read_parquet(data: bytes, schema: pa.Schema, *, optional: Sequence[str] = ()) -> pa.Table:
    """The table in `data`, whole, valid and with the columns of `schema`; pyarrow.ArrowInvalid for anything else.

    Those of the `optional` columns that the file does not have are null. pyarrow itself reports damage also as OSError
    or ValueError, or only once a value is taken out.
    """
    try:
        check_parquet(data)
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        # A text that is repeated a million times is kept once until it is known what all of them take.
        file = pq.ParquetFile(io.BytesIO(data), read_dictionary=texts)
        absent = [schema.field(name) for name in optional if name not in file.schema_arrow.names]
        present = pa.schema([field for field in schema if field not in absent])
        _refuse_other_columns(file.schema_arrow, present)
        _refuse_claims(file.metadata)
        batches = list(_bounded(file))
        table = pa.Table.from_batches(batches, file.schema_arrow).cast(present).replace_schema_metadata()
        table.validate(full=True)
        for field in absent:
            table = table.append_column(field, pa.nulls(len(table), field.type))
        table = table.select(schema.names)
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        raise pa.ArrowInvalid(f"not a readable parquet file: {error}") from error
    return table


def _refuse_other_columns(found: pa.Schema, wanted: pa.Schema) -> None:
    """Before any value is read: a file can name types whose values are unpickled (Ray Data registers one)."""
    if found.names != wanted.names:
        raise pa.ArrowInvalid(f"its columns are {', '.join(found.names)[:200]}")
    for name in wanted.names:
        kind = found.field(name).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if plain != wanted.field(name).type:
            raise pa.ArrowInvalid(f"its column {name} is {str(kind)[:100]} instead of {wanted.field(name).type}")


def _refuse_claims(metadata: pq.FileMetaData) -> None:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    size = sum(column.total_uncompressed_size for column in columns)
    # Values of lists are not rows.
    values = max((column.num_values for column in columns), default=0)
    if rows > MOST_ROWS or values > MOST_ROWS * 8:
        raise pa.ArrowInvalid(f"it claims {max(rows, values):,} rows or values, more than any file of a run has")
    if size > MOST_BYTES:
        raise pa.ArrowInvalid(f"it claims {size:,} bytes, more than any file of a run has")


def _bounded(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    size = 0
    for batch in file.iter_batches(_ROWS_AT_ONCE):
        size += sum(written_out_bytes(column) for column in batch.columns)
        if size > MOST_BYTES:
            raise pa.ArrowInvalid(f"its values take more than {MOST_BYTES >> 20} MiB")
        yield batch


def written_out_bytes(column: pa.Array | pa.ChunkedArray) -> int:
    """Memory of a column once every text is written out."""
    if isinstance(column, pa.ChunkedArray):
        return sum(map(written_out_bytes, column.chunks))
    if pa.types.is_list(column.type):
        return written_out_bytes(column.flatten()) + 4 * len(column)
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary)
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0) + 4 * len(column)

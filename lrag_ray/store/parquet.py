"""Parquet files that may come from strangers."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes, schema: pa.Schema | None = None) -> pa.Table:
    """The table in `data`, whole and valid; pyarrow.ArrowInvalid for anything else.

    pyarrow itself reports damage also as OSError or ValueError, or only once a value is taken out.
    """
    try:
        table = pq.read_table(io.BytesIO(data), schema=schema)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise pa.ArrowInvalid(f"not a readable parquet file: {error}") from error
    return table

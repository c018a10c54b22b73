"""Tables of a stranger's run: where Ray Data is imported, Arrow unpickles columns of a type that a file names."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.vbench_long.parquet import rows_from_parquet, rows_to_parquet
from lrag_ray.scoring.video_rows import from_parquet, to_parquet
from lrag_ray.store.parts import TRACE_SCHEMA, BrokenPartError, read_trace


class Harmful:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("acted",)


def _schema_of(data: bytes) -> pa.Schema:
    return pq.read_schema(io.BytesIO(data))


READERS: dict[str, tuple[pa.Schema, Callable[[bytes], object]]] = {
    "trace": (TRACE_SCHEMA, read_trace),
    "vbench": (_schema_of(rows_to_parquet([])), rows_from_parquet),
    "preview": (_schema_of(to_parquet([], PREVIEW)), lambda data: from_parquet(data, PREVIEW)),
}


@pytest.mark.parametrize(("reader", "column"), [(name, at) for name in READERS for at in range(len(READERS[name][0]))])
def test_a_column_of_pickles_is_not_unpickled(
    reader: str, column: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, read = READERS[reader]
    monkeypatch.chdir(tmp_path)
    columns = {field.name: pa.nulls(1, type=field.type) for field in schema}
    columns[schema.names[column]] = ArrowPythonObjectArray.from_objects([Harmful()])
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    with pytest.raises((pa.ArrowException, BrokenPartError, ValueError)):
        read(sink.getvalue())
    assert list(tmp_path.iterdir()) == []
    # The attack itself is a real one.
    assert pq.read_table(io.BytesIO(sink.getvalue())).num_rows == 1
    pq.read_table(io.BytesIO(sink.getvalue())).to_pylist()
    assert (tmp_path / "acted").exists()


def _repeated(rows: int) -> dict[str, bytes]:
    """Traces of a few kilobytes: very many rows, a long text in each row, and zeros that compress to nothing."""
    return {
        "rows": _of_one_kind("current", rows),
        "texts": _of_one_kind("x" * 50_000, 20_000),
        "bytes": _of_one_kind("\0" * (300 << 20), 1),
    }


def _of_one_kind(kind: str, rows: int) -> bytes:
    columns = {field.name: pa.nulls(rows, field.type) for field in TRACE_SCHEMA} | {"kind": pa.repeat(kind, rows)}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=TRACE_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def test_a_small_file_that_becomes_gigabytes_is_refused_before_it_does() -> None:
    for name, data in _repeated(2_500_000).items():
        assert len(data) < 400_000, name
        before = pa.total_allocated_bytes()
        with pytest.raises(BrokenPartError, match="more than"):
            read_trace(data)
        assert pa.total_allocated_bytes() - before < 64 << 20, name

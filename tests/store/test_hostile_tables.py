"""Tables of a stranger's run: where Ray Data is imported, Arrow unpickles columns of a type that a file names."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from lrag_ray.errors import StorageError
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.vbench_long.parquet import rows_from_parquet, rows_to_parquet
from lrag_ray.scoring.video_rows import from_parquet, to_parquet
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_index import (
    ROW_SCHEMA,
    ROWS_PER_GROUP,
    SEGMENT_PREFIX,
    DamagedIndexError,
    IndexManifest,
    IndexSegment,
    LatentForm,
    read_manifest,
)
from lrag_ray.store.datasets import LatentDataset
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


@pytest.mark.parametrize("name", ROW_SCHEMA.names)
def test_an_index_without_one_of_its_columns_is_damaged(tmp_path: Path, name: str) -> None:
    whole = pa.table({field.name: pa.array([ROW[field.name]], field.type) for field in ROW_SCHEMA})
    with pytest.raises(DamagedIndexError, match=r"Fix: delete dataset/index\.json"):
        read_everything(dataset_of(tmp_path, whole.drop_columns([name])))


def test_an_offset_inside_the_header_of_a_part_is_refused(tmp_path: Path) -> None:
    columns = {f.name: pa.array([{**ROW, "part_offset": [0]}[f.name]], f.type) for f in ROW_SCHEMA}
    with pytest.raises(DamagedIndexError, match="column part_offset"):
        read_everything(dataset_of(tmp_path, pa.table(columns)))


def test_a_manifest_that_names_a_segment_twice_is_damaged(tmp_path: Path) -> None:
    storage = dataset_of(tmp_path, pa.table({f.name: pa.array([ROW[f.name]], f.type) for f in ROW_SCHEMA}))
    manifest = read_manifest(storage)
    assert manifest is not None
    twice = manifest.model_copy(update={"segments": manifest.segments * 2})
    storage.write("dataset/index.json", twice.sealed())
    with pytest.raises(DamagedIndexError, match=r"names a segment twice.*Fix: delete it"):
        read_everything(storage)


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


ROW: dict[str, Any] = {
    "key": "k" * 64, "prompt_index": 0, "sample": 0, "frames": 2, "part": ["dataset/latents/a.safetensors"],
    "part_first_frame": [0], "part_frames": [2], "part_offset": [88], "part_bytes": [96], "part_sha256": ["0" * 64],
    "rollout": "a.pt", "backbone": "", "method": "", "prompt_id": "", "prompt": "", "latents_digest": "d" * 64,
}  # fmt: skip


def dataset_of(folder: Path, table: pa.Table, *, rows_per_group: int = ROWS_PER_GROUP) -> Storage:
    """A dataset whose index is `table`, and whose only part is too short for anything."""
    storage, sink = Storage(str(folder)), io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=rows_per_group)
    segment = IndexSegment(
        path=f"{SEGMENT_PREFIX}1-a.parquet",
        size_bytes=len(sink.getvalue()),
        sha256="0" * 64,
        rollouts=max(1, table.num_rows),
        frames=1,
        shortest=1,
    )
    form = LatentForm(channels=1, height=1, width=1, dtype="float32")
    storage.write(segment.path, sink.getvalue())
    storage.write("dataset/latents/a.safetensors", bytes(88))
    storage.write("dataset/index.json", IndexManifest(generation="g", form=form, segments=[segment]).sealed())
    return storage


def read_everything(storage: Storage) -> None:
    data = LatentDataset.open(storage.uri)
    assert data.keys and data.digest
    for index in range(len(data)):
        assert len(data.parts(index)) > 0 and data.rollouts[index].frames > 0
        data.read(index)


VALUES = st.one_of(
    st.none(), st.sampled_from([0, -1, 1, 2, 3, 2**31 - 1, 2**62, "", "../x", "/etc/passwd", "\x1b", "x" * 2000])
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(ROW_SCHEMA.names), value=st.one_of(VALUES, st.lists(VALUES, max_size=3)))
def test_any_value_in_the_index_of_a_dataset_is_refused_with_a_message(
    name: str, value: object, tmp_path: Path
) -> None:
    try:
        table = pa.table({field.name: pa.array([{**ROW, name: value}[field.name]], field.type) for field in ROW_SCHEMA})
    except (pa.ArrowException, OverflowError, TypeError):
        return
    storage = dataset_of(tmp_path, table)
    with pytest.raises(StorageError):
        read_everything(storage)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("key", [None]),
        ("frames", [0]),
        ("frames", [-5]),
        ("prompt_index", [-1]),
        ("part", [None]),
        ("part", [[None]]),
        ("part", [[]]),
        ("part_offset", [[1, 2]]),
        ("part_offset", [[-1]]),
        ("prompt_id", ["x" * 2000]),
    ],
)
def test_rows_that_no_writer_makes_damage_the_index(name: str, values: list[object], tmp_path: Path) -> None:
    columns = {field.name: pa.array([ROW[field.name]], field.type) for field in ROW_SCHEMA}
    columns[name] = pa.array(values, ROW_SCHEMA.field(name).type)
    with pytest.raises(DamagedIndexError, match=rf"(column {name}|lists of parts).*Fix: delete dataset/index\.json"):
        read_everything(dataset_of(tmp_path, pa.table(columns)))


def _index_of(rows: int, **changes: object) -> pa.Table:
    def column(value: object, kind: pa.DataType) -> pa.Array:
        if not pa.types.is_list(kind):
            return pa.repeat(pa.scalar(value, kind), rows)
        assert isinstance(value, list)
        ends = pa.array(range(0, rows * len(value) + 1, len(value)), pa.int32())
        return pa.ListArray.from_arrays(ends, pa.repeat(pa.scalar(value[0], kind.value_type), rows * len(value)))

    return pa.table({field.name: column({**ROW, **changes}[field.name], field.type) for field in ROW_SCHEMA})


def test_a_small_index_that_becomes_gigabytes_is_refused_before_it_does(tmp_path: Path) -> None:
    tables = {
        "rows": (_index_of(100_000), 100_000),
        "texts": (_index_of(ROWS_PER_GROUP, prompt="x" * 200_000), ROWS_PER_GROUP),
        "bytes": (_index_of(1, prompt="\0" * (65 << 20)), 1),
        "parts": (_index_of(1, **{n: ROW[n] * 1_100_000 for n in ROW_SCHEMA.names if n.startswith("part")}), 1),
    }
    for name, (table, rows_per_group) in tables.items():
        storage = dataset_of(tmp_path / name, table, rows_per_group=rows_per_group)
        del table
        before = pa.total_allocated_bytes()
        with pytest.raises(DamagedIndexError, match=r"claims more|take more"):
            LatentDataset.open(storage.uri).rollouts[0]
        assert pa.total_allocated_bytes() - before < 64 << 20, name

"""Prompts from a dataset on the Hugging Face Hub, as a table file that a configuration can name."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lrag_ray.config.prompts import load_prompts
from lrag_ray.config.schema import PromptsSection
from lrag_ray.config.table_file import SUFFIXES, read_table
from lrag_ray.errors import PromptError, UsageError
from lrag_ray.store.hub import SCHEME, Hub, HubPlace

_PARQUET = ".parquet"
_MOST_NAMED = 8


class FetchedPrompts(NamedTuple):
    """A file that was written."""

    file: str
    source: str
    """File on the Hub that it is of."""
    prompts: int


def fetch_prompts(place: HubPlace, target: Path, column: str, limit: int | None) -> FetchedPrompts:
    """Write the prompts in `column` of a dataset's file, with its other columns, to `target` (.jsonl).

    Without a file in `place`, that of the repository which holds a table, if it is one.

    Raises:
        UsageError: `target` exists or is not .jsonl, or it is not known which file is meant.
        PromptError: the file holds no such prompts; see `load_prompts`.
        StorageError: the Hub cannot be reached, or does not have it.
    """
    if target.suffix != ".jsonl":
        raise UsageError(f"{target}: prompts of a dataset are written as JSON Lines. Fix: a name that ends in .jsonl")
    if target.exists() or not target.parent.is_dir():
        what = "exists" if target.exists() else f"is in {target.parent}, which is no folder"
        raise UsageError(f"{target} {what}. Fix: give another name")
    hub = Hub()
    named = place if place.file else place._replace(file=_only_table(hub.files(place), place))
    suffix = Path(named.file).suffix.lower()
    if suffix not in SUFFIXES | {_PARQUET}:
        raise UsageError(
            f"{named.file}: {suffix or 'a file without a suffix'} is not read as a table of prompts. Fix: name a file "
            f"that ends in {', '.join(sorted(SUFFIXES | {_PARQUET}))}"
        )
    with tempfile.TemporaryDirectory(prefix=".prompts-", dir=target.parent) as scratch:
        fetched = hub.fetch(named, Path(scratch))
        rows = _parquet_rows(fetched, named.file, column) if suffix == _PARQUET else _table_rows(fetched, column)
        made = Path(scratch, "prompts.jsonl")
        with made.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in islice(rows, limit))
        try:
            prompts = load_prompts(PromptsSection(path=str(made), column=column))
        except PromptError as error:
            raise PromptError(str(error).replace(str(made), f"{SCHEME}{named.repository}/{named.file}")) from error
        # Created once: a file that came meanwhile must not be replaced.
        os.link(made, target)
    return FetchedPrompts(str(target), named.file, len(prompts))


def _only_table(files: list[str], place: HubPlace) -> str:
    found = [name for name in files if Path(name).suffix.lower() in SUFFIXES | {_PARQUET}]
    if len(found) == 1:
        return found[0]
    names = ", ".join(found[:_MOST_NAMED]) + (f" and {len(found) - _MOST_NAMED} more" if found[_MOST_NAMED:] else "")
    held = f"holds several tables ({names})" if found else "holds no table"
    raise UsageError(f"{SCHEME}{place.repository} {held}. Fix: name a file, {SCHEME}{place.repository}/FILE")


def _table_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    for row in read_table(path, column, "the dataset's file", PromptError, column_key="--column").rows:
        yield dict(row.cells)


def _parquet_rows(path: Path, name: str, column: str) -> Iterator[dict[str, Any]]:
    """Rows with their columns of text, numbers and truth values; others, such as pictures, are left out."""
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        plain = [field.name for field in schema if _is_plain(field.type)]
        if column not in plain:
            raise PromptError(
                f"{name}: no column '{column}' of text; it has {', '.join(schema.names[:_MOST_NAMED])}. Fix: --column"
            )
        for batch in file.iter_batches(batch_size=1024, columns=plain):
            for row in batch.to_pylist():
                yield {name: _finite(value) for name, value in row.items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PromptError(f"{name} is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    return any(test(kind) for test in tests)

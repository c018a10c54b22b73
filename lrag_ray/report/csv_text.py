"""CSV that people open in spreadsheets: names and prompts of strangers are cells there, never formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t")
"""A spreadsheet computes text that begins so."""


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows by column with a head line; what a row lacks is empty, what would be computed has an apostrophe in front."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    # The csv module leaves a carriage return unquoted, which would end the line for a reader.
    text = value.replace("\r", " ")
    return f"'{text}" if text.startswith(_FORMULA) else text

"""Tables that a user hands over as CSV, JSON or JSON Lines: prompt files and manifests.

CSV may be separated by commas, semicolons or tabs, as spreadsheets write it; quoted cells may contain line breaks.
JSON Lines end at line feeds alone. Nothing is guessed: what does not parse is refused with its line.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrag_ray.errors import LragError
from lrag_ray.text_file import MOST_VALUE_BYTES, is_json_bomb, read_text

JSON_LINES = frozenset({".jsonl", ".ndjson"})
"""Suffixes of files with one JSON object a line."""
SUFFIXES = frozenset({".csv", ".tsv", ".json"}) | JSON_LINES
"""Of files that are tables."""

_SEPARATORS = {",": "','", ";": "';'", "\t": "tab"}
_MOST_NAMED = 12
_MOST_COLUMNS = 10_000
_MOST_CELLS = 20_000_000
"""Of a CSV file: two million captions with ten columns."""
_MOST_NESTED = 64
"""Levels of JSON; records of a run are read to about 200."""
_TOO_DEEP = "not read: JSON that is nested too deeply"


@dataclass(frozen=True)
class Row:
    """One record."""

    number: int
    """From 0: the line in JSON Lines, else the position among the records."""
    line: int
    """Line of the file on which it begins, from 1."""
    cells: Mapping[str, Any]
    """By column; text in CSV, any JSON value elsewhere."""


@dataclass(frozen=True)
class Table:
    """A table file."""

    columns: Sequence[str]
    """In order of appearance."""
    rows: Sequence[Row]


class TableFaultError(ValueError):
    """What is wrong, and on which line (0: the whole file)."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


class _NoColumnError(TableFaultError):
    """The column is not there."""


def read_table(
    path: str | Path, column: str, what: str, error: type[LragError], *, missing: str = "", column_key: str = ""
) -> Table:
    """Rows of a file, each with a value (which may be empty) in `column`.

    `what` names the file's role; a suffix that is not that of JSON means CSV. `column_key` is the configuration's key
    that names another column, `missing` the message where the file does not exist.

    Raises:
        error: the file cannot be read, does not parse, or lacks the column; names line, separator and columns.
    """
    text = read_text(path, what, error, missing=missing)
    suffix = Path(path).suffix.lower()
    try:
        if suffix in JSON_LINES:
            rows = list(_json_lines(text, column))
        elif suffix == ".json":
            rows = list(_json(text, column))
        else:
            rows = list(_csv(text, column, "\t" if suffix == ".tsv" else ""))
    except _NoColumnError as fault:
        other = f"; {column_key} names another column" if column_key else ""
        raise error(f"{_place(path, fault)}: {fault}{other}") from None
    except TableFaultError as fault:
        raise error(f"{_place(path, fault)}: {fault}") from None
    return Table(list(dict.fromkeys(name for row in rows for name in row.cells)), rows)


def _place(path: str | Path, fault: TableFaultError) -> str:
    return f"{path}:{fault.line}" if fault.line else str(path)


def _csv(text: str, column: str, separator: str) -> Iterator[Row]:
    skipped = 0
    first = text.partition("\n")[0].rstrip("\r")
    if first.lower().startswith("sep=") and len(first) == len("sep=") + 1:
        # Excel's own line.
        separator, skipped, text = first[-1], 1, text.partition("\n")[2]
    names, separator = _header(text, column, separator, skipped + 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    number, end, count = -1, 0, 0
    try:
        for cells in reader:
            begin, end = skipped + end + 1, reader.line_num
            if begin == skipped + 1:
                continue
            number += 1
            count += len(cells)
            if count > _MOST_CELLS:
                raise TableFaultError(begin, f"more than {_MOST_CELLS:,} values. Fix: give a part of the file")
            if not any(cells):
                continue
            if len(cells) > len(names):
                raise TableFaultError(
                    begin,
                    f"more values than the head line has columns ({len(cells)} instead of {len(names)}); quote cells "
                    f"that contain {_SEPARATORS.get(separator, repr(separator))}",
                )
            row = {name: cell for name, cell in zip(names, cells, strict=False) if name or cell}
            if "" in row:
                raise TableFaultError(begin, f"a value without a name of its column in the head line: {row['']!r}")
            if column not in row:
                raise TableFaultError(begin, f"ends before column '{column}' ({len(cells)} of {len(names)} values)")
            yield Row(number, begin, row)
    except csv.Error as fault:
        raise TableFaultError(skipped + end + 1, f"not CSV: {fault}") from None


def _header(text: str, column: str, separator: str, line: int) -> tuple[list[str], str]:
    """Names of the columns, and the separator that shows `column` among them."""
    found: dict[str, list[str]] = {}
    for each in [separator] if separator else _SEPARATORS:
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=each, strict=True), [])
        except (csv.Error, TypeError):
            continue
        found[each] = [cell.strip() for cell in cells]
        if column in found[each]:
            if len(found[each]) > _MOST_COLUMNS:
                raise TableFaultError(
                    line,
                    f"a head line of {len(found[each]):,} columns, more than {_MOST_COLUMNS:,}. Fix: leave some out",
                )
            twice = _twice(name for name in found[each] if name)
            if twice is not None:
                raise TableFaultError(line, f"the head line names column '{twice}' twice")
            return found[each], each
    if not any(any(names) for names in found.values()):
        raise TableFaultError(0, "no head line; CSV begins with the names of its columns")
    best = max(found, key=lambda each: len(found[each]))
    if len(found[best]) == 1 and (other := next((c for c in "|:" if column in found[best][0].split(c)), "")):
        raise TableFaultError(
            line, f"columns separated by {other!r}, not by ',', ';' or tab. Fix: save the file with one of those"
        )
    raise _NoColumnError(
        0,
        f"no column '{column}'; the columns, separated by {_SEPARATORS.get(best, repr(best))}, are "
        f"{_named(found[best])}{_nearest(column, found[best])}",
    )


def _json_lines(text: str, column: str) -> Iterator[Row]:
    _refuse_bomb(text)
    for number, line in enumerate(text.split("\n")):
        if line.strip(" \t\r"):
            yield Row(number, number + 1, _object(parse_json(line, number + 1), number + 1, column))


def _json(text: str, column: str) -> Iterator[Row]:
    try:
        value = parse_json(text, 0)
    except TableFaultError as fault:
        if not str(fault).startswith("not JSON: Extra data"):
            raise
        # Several values after one another: JSON Lines under another name.
        yield from _json_lines(text, column)
        return
    items = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and column not in value:
        # A list of records under a name, beside what describes it.
        lists = [inner for inner in value.values() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        items = lists[0] if len(lists) == 1 else items
    if not items or not all(isinstance(item, dict) for item in items):
        held = "an empty list" if not items else "a list of texts" if isinstance(items[0], str) else "no objects"
        raise TableFaultError(
            0,
            f'JSON with {held}; expected a list of objects, [{{"{column}": "…"}}, …]. Fix: write it so, or write one '
            "text a line into a .txt file",
        )
    for number, item in enumerate(items):
        at = f"object {number + 1}: " if len(items) > 1 else ""
        yield Row(number, number + 1, _object(item, 0, column, at))


def _object(value: Any, line: int, column: str, at: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TableFaultError(line, f'not a JSON object; expected {{"{column}": "…"}}')
    if column not in value:
        several = [name for name, item in value.items() if isinstance(item, list)]
        hint = (
            f". '{several[0]}' is a list: one video follows one text, so write one object for each"
            if several and several[0].startswith(column)
            else _nearest(column, list(value))
        )
        raise _NoColumnError(line, f"{at}no field '{column}'; the fields are {_named(list(value))}{hint}")
    return value


def parse_json(text: str, line: int) -> Any:
    """One JSON value as the standard has it: no key twice, no NaN, no half characters, no NUL."""
    _refuse_bomb(text)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as fault:
        place = f" at column {fault.colno}" if line else f" at line {fault.lineno}, column {fault.colno}"
        raise TableFaultError(line, f"not JSON: {fault.msg.removesuffix(' at')}{place}") from None
    except ValueError as fault:
        raise TableFaultError(line, f"not JSON: {fault}") from None
    except RecursionError:
        raise TableFaultError(line, _TOO_DEEP) from None
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > _MOST_NESTED:
            raise TableFaultError(line, _TOO_DEEP)
        if isinstance(item, dict):
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            pending += [(part, depth + 1) for part in item]
        elif isinstance(item, str) and (bad := next((c for c in item if c == "\0" or "\ud800" <= c <= "\udfff"), "")):
            raise TableFaultError(
                line, f"text with {'a NUL' if bad == chr(0) else f'half a character, U+{ord(bad):04X}'}"
            )
        elif isinstance(item, int | float) and not (
            -(2**63) <= item < 2**64 if isinstance(item, int) else math.isfinite(item)
        ):
            raise TableFaultError(line, "a number beyond 64 bits. Fix: put quotes around it")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"key {_twice(name for name, _ in pairs)!r} is given twice")
    return made


def _twice(names: Iterable[str]) -> str | None:
    """The first name that was there before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _refuse_bomb(text: str) -> None:
    if is_json_bomb(text):
        raise TableFaultError(
            0, f"its values take more than {MOST_VALUE_BYTES >> 20} MiB. Fix: give a part of the file"
        )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _named(columns: Sequence[str]) -> str:
    shown = ", ".join(f"'{name[:60]}'" for name in columns[:_MOST_NAMED])
    return shown if len(columns) <= _MOST_NAMED else f"{shown} and {len(columns) - _MOST_NAMED} more"


def _nearest(column: str, columns: Sequence[str]) -> str:
    found = [name for name in columns if name.casefold() == column.casefold() or name.startswith(f"{column}_")]
    found = found or difflib.get_close_matches(column, columns, n=1)
    return f"; did you mean '{found[0]}'?" if found else ""

"""Prompt files: UTF-8 text with one prompt a line, or a CSV, JSON or JSON Lines table with a column of prompts.

In text, blank lines are skipped but counted, so that a prompt's index is its line number from 0 and adding a blank line
at the end changes nothing. A byte order mark and Windows line ends are accepted. White space around a prompt is cut
off. The other columns of a table are kept with the prompt.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lrag_ray.config.latents import SampledPromptsSection
from lrag_ray.config.schema import PromptsSection
from lrag_ray.config.table_file import SUFFIXES, TableFaultError, parse_json, read_table
from lrag_ray.errors import PromptError
from lrag_ray.text_file import read_text

WHERE_TO_GET = (
    "the paper's are in checkpoints/ of the Hub repository qixinhu11/LongLive-RAG: moviegenbench_128_refined.txt (the "
    "MovieGen benchmark prompts, refined; its videos) and vidprom_filtered_extended.txt (the pool of its latent "
    "corpus); any UTF-8 text file with one prompt a line will do"
)

_MOST_SHOWN = 5
_FOREIGN = frozenset({".yaml", ".yml", ".toml", ".xml", ".html", ".xlsx", ".xls", ".ods", ".parquet", ".arrow"})
"""Suffixes of files whose lines are not prompts."""
_TIMED = re.compile(r"\[[^\[\]|]*\d\s*(?:m?s|sec|seconds?|m|min|minutes?|f|frames?)?\s*#[^\[\]|]*\]", re.IGNORECASE)
"""``[10s#]``: which of several texts a video follows from when on."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file."""

    index: int
    """From 0: line number in text and JSON Lines, position among the records of other tables."""
    text: str
    prompt_id: str
    """``<index>-<hash of the text>``, e.g. ``00003-1f2e3d4c``."""
    line: int
    """Line of the file on which it begins, from 1; in JSON its position."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of a table."""
    original: str = ""
    """The text before it was refined; empty where it was not."""


def make_prompt(index: int, text: str, line: int = 0, columns: Mapping[str, Any] | None = None) -> Prompt:
    """The prompt with its id; on the line after `index` unless another one is given."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return Prompt(index, text, f"{index:05d}-{digest[:8]}", line or index + 1, columns or {})


def load_prompts(section: PromptsSection) -> list[Prompt]:
    """Prompts of the section's file in file order, a sample of them where the section asks for one, at most `limit`.

    Raises:
        PromptError: no file named, file missing or without prompts, bytes that are not UTF-8, control characters, a
            table that does not parse or lacks the column, several prompts for one video.
    """
    return _sampled(section, _read_pool(section))[: section.limit]


class _Pool(NamedTuple):
    """What a file holds."""

    prompts: list[Prompt]
    size: int
    """Lines of a text file, blank ones included; records of a table."""


def _read_pool(section: PromptsSection) -> _Pool:
    path = section.path
    if path is None:
        raise PromptError(f"prompts.path is not given: {WHERE_TO_GET}")
    suffix = Path(path).suffix.lower()
    if suffix in _FOREIGN:
        raise PromptError(
            f"{path}: {suffix} is not read as a prompt file. Fix: write one prompt a line into a .txt file, or a "
            f"column '{section.column}' into {', '.join(sorted(SUFFIXES))}"
        )
    if suffix in SUFFIXES:
        prompts = list(_of_table(path, section.column))
        pool = _Pool(prompts, len(prompts))
    else:
        pool = _of_text(path, section.column)
    if not pool.prompts:
        raise PromptError(f"{path}: no prompt in it; write one prompt a line")
    for prompt in pool.prompts:
        if found := _TIMED.search(prompt.text):
            raise PromptError(
                f"{path}:{prompt.line}: '{_shortened(found[0])}' begins one of several prompts for one video, and a "
                "video follows one prompt (prompt switching does not exist yet). Fix: give one prompt without times"
            )
    return pool


def draw(size: int, ratio: float, seed: int) -> list[int]:
    """Positions of a sample of `size` prompts, ascending: Python's own generator, as the released code draws them."""
    return sorted(random.Random(seed).sample(range(size), max(1, int(size * ratio))))


def _sampled(section: PromptsSection, pool: _Pool) -> list[Prompt]:
    if not isinstance(section, SampledPromptsSection):
        return pool.prompts
    chosen = set(draw(pool.size, section.ratio, section.seed))
    # A table's records are drawn by position, a text file's prompts by line.
    is_text = pool.size != len(pool.prompts)
    found = [p for i, p in enumerate(pool.prompts) if (p.index if is_text else i) in chosen]
    if not found:
        raise PromptError(f"{section.path}: every line of the sample is blank. Fix: remove the blank lines")
    return found


def sample_notes(section: PromptsSection) -> Iterator[str]:
    """What a person should know of the sample: how many are drawn of how many, and drawn lines that are blank."""
    if not isinstance(section, SampledPromptsSection):
        return
    if section.path is None or not Path(section.path).exists():
        return
    pool = _read_pool(section)
    chosen = draw(pool.size, section.ratio, section.seed)
    blank = len(chosen) - len(_sampled(section, pool))
    yield f"prompts: {len(chosen):,} of {pool.size:,} are drawn (ratio {section.ratio:g}, seed {section.seed})" + (
        f"; {blank:,} of them are blank lines, which give no rollout" if blank else ""
    )


def plan_prompts(section: PromptsSection) -> list[Prompt]:
    """Prompts to plan with: those of the file, or `count` stand-ins without text where there is no file yet."""
    if section.count is None or (section.path is not None and Path(section.path).exists()):
        return load_prompts(section)
    chosen: Sequence[int] = range(section.count)
    if isinstance(section, SampledPromptsSection):
        chosen = draw(section.count, section.ratio, section.seed)
    return [make_prompt(i, "") for i in chosen[: section.limit]]


def duplicate_warnings(prompts: Sequence[Prompt]) -> list[str]:
    """One line per text that occurs more than once: allowed, but it makes the same videos several times."""
    by_text: dict[str, list[int]] = {}
    for prompt in prompts:
        if prompt.text:
            by_text.setdefault(prompt.text, []).append(prompt.line)
    return [
        f"lines {listed(lines)} hold the same prompt, which makes the same video: {_shortened(text)!r}"
        for text, lines in by_text.items()
        if len(lines) > 1
    ]


def listed(lines: Sequence[int]) -> str:
    """``1 and 2``, ``1, 2 and 3``, ``1, 2, 3, 4, 5 and 7 more``."""
    shown = [str(line) for line in lines[:_MOST_SHOWN]]
    if len(lines) > _MOST_SHOWN:
        shown.append(f"{len(lines) - _MOST_SHOWN} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def _of_table(path: str, column: str) -> Iterable[Prompt]:
    table = read_table(path, column, "the prompt file", PromptError, missing=_MISSING, column_key="prompts.column")
    for row in table.rows:
        value = row.cells[column]
        if not isinstance(value, str) or not value.strip():
            found = "is empty" if value in ("", None) or isinstance(value, str) else f"is {_described(value)}"
            raise PromptError(f"{path}:{row.line}: '{column}' {found}; expected the text of one prompt")
        text = value.strip(" \t\r\n")
        if fault := _control_character(row.line, text, allowed="\t\r\n\u2028\u2029\x85"):
            raise PromptError(f"{path}:{fault}")
        columns = {name: cell for name, cell in row.cells.items() if name != column}
        yield make_prompt(row.number, text, row.line, columns)


def _described(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} (several prompts for one video, which follows one prompt)"
    return "not text"


def _of_text(path: str, column: str) -> _Pool:
    if column != PromptsSection.model_fields["column"].default:
        raise PromptError(f"{path}: prompts.column is '{column}', but the file is text with one prompt a line")
    text = read_text(path, "the prompt file", PromptError, missing=_MISSING)
    lines = [line.removesuffix("\r").strip(" \t") for line in text.split("\n")]
    faults = [fault for number, line in enumerate(lines, start=1) if (fault := _control_character(number, line))]
    if faults:
        shown = [f"{path}:{fault}" for fault in faults[:_MOST_SHOWN]]
        more = [f"and {len(faults) - _MOST_SHOWN} more lines"] if len(faults) > _MOST_SHOWN else []
        raise PromptError("\n".join([*shown, *more]))
    first = next((line for line in lines if line), "")
    if kind := _kind_of_table(first, text, column):
        raise PromptError(
            f"{path}: {kind}, not one prompt a line. Fix: write the prompts alone, one a line; or give the file the "
            f"suffix {'.csv' if kind == _CSV else '.json or .jsonl'} and each prompt the "
            f"{'column' if kind == _CSV else 'field'} '{column}'"
        )
    prompts = [make_prompt(index, line) for index, line in enumerate(lines) if line]
    return _Pool(prompts, len(lines) - text.endswith("\n"))


_MISSING = f"no such prompt file (prompts.path); {WHERE_TO_GET}"
_CSV = "the first line is a CSV head line"
_JSON = "the file is JSON"
_YAML = "the file is YAML"


def _kind_of_table(first: str, text: str, column: str) -> str:
    """What a file is whose lines are not prompts, judging by its first line and, for JSON, all of it."""
    name = column.casefold()
    # Also of the languages: prompt_en.
    heads = (cell.strip(' "').casefold() for by in ",;\t" if by in first for cell in first.split(by))
    if first.casefold() == name or any(head == name or head.startswith(f"{name}_") for head in heads):
        return _CSV
    if first == "---" or first.casefold().startswith((f"- {name}:", f"{name}s:")):
        return _YAML
    if first in ("[", "{"):
        return _JSON
    if first.startswith(("[", "{")):
        for candidate in (first, text):
            try:
                if isinstance(parse_json(candidate, 0), dict | list):
                    return _JSON
            except TableFaultError:
                continue
    return ""


def _control_character(number: int, line: str, allowed: str = "\t") -> str | None:
    if line.isprintable():
        # A character at a time, a file above the limit of uploads takes minutes.
        return None
    for column, character in enumerate(line, start=1):
        if character not in allowed and unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            kind = "line separator" if unicodedata.category(character) != "Cc" else "control character"
            return f"{number}: {kind} U+{ord(character):04X} at column {column}; a prompt is one line of plain text"
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."

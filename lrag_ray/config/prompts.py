"""Prompt files: UTF-8 text, one prompt a line.

Blank lines are skipped but counted, so that a prompt's index is its line number from 0 and adding a blank line at the
end changes nothing. A byte order mark and Windows line ends are accepted. White space around a prompt is cut off.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrag_ray.config.schema import PromptsSection
from lrag_ray.errors import PromptError

WHERE_TO_GET = (
    "the prompts of the paper are moviegenbench_128_refined.txt (the MovieGen benchmark prompts, refined), in "
    "checkpoints/ of the Hub repository qixinhu11/LongLive-RAG; any UTF-8 text file with one prompt a line will do"
)

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    index: int
    """Line number, from 0."""
    text: str
    prompt_id: str
    """``<index>-<hash of the text>``, e.g. ``00003-1f2e3d4c``."""


def make_prompt(index: int, text: str) -> Prompt:
    """The prompt with its id."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return Prompt(index, text, f"{index:05d}-{digest[:8]}")


def load_prompts(section: PromptsSection) -> list[Prompt]:
    """Prompts of the section's file in file order, at most `limit`.

    Raises:
        PromptError: no file named, file missing or without prompts, bytes that are not UTF-8, control characters.
    """
    if section.path is None:
        raise PromptError(f"prompts.path is not given: {WHERE_TO_GET}")
    prompts = [make_prompt(index, line) for index, line in enumerate(_lines(section.path)) if line]
    if not prompts:
        raise PromptError(f"{section.path}: no prompt in it; write one prompt a line")
    return prompts[: section.limit]


def plan_prompts(section: PromptsSection) -> list[Prompt]:
    """Prompts to plan with: those of the file, or `count` stand-ins without text where there is no file yet."""
    if section.count is None or (section.path is not None and Path(section.path).exists()):
        return load_prompts(section)
    return [make_prompt(index, "") for index in range(min(section.count, section.limit or section.count))]


def duplicate_warnings(prompts: Sequence[Prompt]) -> list[str]:
    """One line per text that occurs more than once: allowed, but it makes the same videos several times."""
    by_text: dict[str, list[int]] = {}
    for prompt in prompts:
        if prompt.text:
            by_text.setdefault(prompt.text, []).append(prompt.index + 1)
    return [
        f"lines {_listed(lines)} hold the same prompt, which makes the same video: {_shortened(text)!r}"
        for text, lines in by_text.items()
        if len(lines) > 1
    ]


def _lines(path: str) -> list[str]:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise PromptError(f"{path}: no such prompt file (prompts.path); {WHERE_TO_GET}") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot read the prompt file: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec has already taken a byte order mark off the bytes that it counts.
        offset = len(data) - len(error.object) + error.start
        line = data.count(b"\n", 0, offset) + 1
        raise PromptError(
            f"{path}:{line}: byte 0x{data[offset]:02x} at offset {offset} is not UTF-8; save the file as UTF-8"
        ) from None
    lines = [line.removesuffix("\r").strip(" \t") for line in text.split("\n")]
    faults = [fault for number, line in enumerate(lines, start=1) if (fault := _control_character(number, line))]
    if faults:
        shown = [f"{path}:{fault}" for fault in faults[:_MOST_SHOWN]]
        more = [f"and {len(faults) - _MOST_SHOWN} more lines"] if len(faults) > _MOST_SHOWN else []
        raise PromptError("\n".join([*shown, *more]))
    return lines


def _control_character(number: int, line: str) -> str | None:
    for column, character in enumerate(line, start=1):
        if character != "\t" and unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            kind = "line separator" if unicodedata.category(character) != "Cc" else "control character"
            return f"{number}: {kind} U+{ord(character):04X} at column {column}; a prompt is one line of plain text"
    return None


def _listed(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:_MOST_SHOWN]))
    return shown if len(lines) <= _MOST_SHOWN else f"{shown} and {len(lines) - _MOST_SHOWN} more"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."

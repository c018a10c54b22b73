"""Text from files in a form that cannot act on a terminal: no cursor movement, links, hidden or reordered text.

And results as plain data, which is what is printed as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: controls (C0, C1), invisible and bidirectional format characters, lone surrogates, separators."""


def printable(text: str) -> str:
    """`text` with every control, format and separator character but line feed and tab replaced by U+FFFD.

    Each is replaced by one character, so that positions in the text stay what they are.
    """
    if text.isprintable():
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_unsafe(character) else character for character in text)


def json_text(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON; what a terminal might act on is written as an escape, so the value stays what it is."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(json.dumps(character)[1:-1] if _is_unsafe(character) else character for character in text)


def plain(value: Any) -> Any:
    """Dataclasses, named tuples and pydantic records as dicts, all the way down."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _is_unsafe(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in _UNSAFE


def quantity(value: float, unit: str) -> str:
    """Four digits with an SI prefix: ``141.5 TFLOP``, ``287.5 MB``."""
    if not value:
        return f"0 {unit}"
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.95 or prefix == "E":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}"


def counted(number_of: int, what: str, plural: str = "") -> str:
    """A number of things in words: ``1 video``, ``1,228 videos``; `plural` where it is not `what` with an s."""
    return f"{number_of:,} {what if number_of == 1 else plural or f'{what}s'}"


def listed(names: Sequence[str]) -> str:
    """Names as a list in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

"""``--set a.b=value``: values that replace those of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lrag_ray.config.source import Document, KeyPath, dotted, parse_value

_MOST_SHOWN = 500
"""Characters of an override in a message."""


def quoted(value: Any) -> str:
    """Text, or a list of texts, as YAML that every reader takes for just that: for overrides that a program makes."""
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    plain = (c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
    return f'"{"".join(plain)}"'


def apply_overrides(document: Document, overrides: Sequence[str]) -> Iterator[str]:
    """Set all of `overrides` while this is iterated over, to its end; yields a line for each that is wrong."""
    for override in overrides:
        try:
            apply_override(document, override)
        except ValueError as error:
            yield f"--set {_shortened(override)}: {error}"


def _shortened(override: str) -> str:
    return override if len(override) <= _MOST_SHOWN else f"{override[:_MOST_SHOWN]}... ({len(override):,} characters)"


def apply_override(document: Document, override: str) -> None:
    """Set one value in `document`, later ones winning.

    The value is YAML (``3``, ``[30, 60]``, ``null``, ``{method: rag, top_k: 4}``) or text, which is taken literally
    with any ``#`` in it. Missing sections are made. In a list, a position replaces that item. A name that itself holds
    dots is found where it is already given.

    Raises:
        ValueError: not of the form a.b=value, or a step of the path leads through something that is not a section.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or "" in key.split("."):
        raise ValueError("an override is written a.b=value")
    if not key.isprintable():
        raise ValueError(f"the key {ascii(key)[:_MOST_SHOWN]} holds a character that no key has")
    if not text.strip():
        raise ValueError(f"no value after '{key}='; write null to unset, or \"''\" for an empty text")
    try:
        value = parse_value(text)
    except ValueError as error:
        raise ValueError(f"the value is not YAML ({error}); put quotes around text with special characters") from None
    path = _set(document.data, key, value)
    document.origins = {known: place for known, place in document.origins.items() if known[: len(path)] != path}
    for end in range(1, len(path) + 1):
        # Sections around the value that the file has keep their line; those that this override makes get its place.
        document.origins.setdefault(path[:end], f"--set {_shortened(override)}")


def _set(section: dict[str, Any], key: str, value: Any) -> KeyPath:
    path: KeyPath = ()
    target: Any = section
    while True:
        step, key = _next_step(target, key, path)
        path = (*path, step)
        if not key:
            target[step] = value
            return path
        if isinstance(target, dict):
            target.setdefault(str(step), None)
        if target[step] is None:
            target[step] = {}
        inner = target[step]
        if not isinstance(inner, dict | list):
            raise ValueError(f"'{dotted(path)}' is a value, not a section with keys of its own")
        target = inner


def _next_step(target: dict[str, Any] | list[Any], key: str, path: KeyPath) -> tuple[str | int, str]:
    """The first step of the dotted `key` inside `target`, and the rest."""
    if isinstance(target, list):
        first, _, rest = key.partition(".")
        if not first.isdecimal() or int(first) >= len(target):
            raise ValueError(
                f"'{dotted(path)}' is a list of {len(target)}; '{first}' is not one of its positions (from 0)"
            )
        return int(first), rest
    known = [name for name in target if key == name or key.startswith(f"{name}.")]
    step = max(known, key=len) if known else key.partition(".")[0]
    return step, key[len(step) + 1 :]

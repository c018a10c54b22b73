"""What is wrong with a configuration, in words that lead to the fix."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lrag_ray.config.redaction import redact
from lrag_ray.config.source import Document, KeyPath, dotted
from lrag_ray.errors import ConfigError

_MOST_PROBLEMS = 50
"""That are put into words; each takes a search for a similar key."""
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (key: value)",
    "model_type": "a section (key: value)",
    "dataclass_type": "a section (key: value)",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


class Problem(NamedTuple):
    """One thing that is wrong."""

    path: KeyPath
    text: str


def raise_problems(document: Document, problems: Iterable[Problem], overrides: Iterable[str] = ()) -> None:
    """ConfigError that lists `overrides` (whole lines) and `problems` with their places, if there are any."""
    lines = [*overrides]
    for problem in problems:
        where = f"{dotted(problem.path)}: " if problem.path else ""
        lines.append(f"{document.origin(problem.path)}: {where}{problem.text}")
    lines = list(dict.fromkeys(redact(line) for line in lines))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        raise ConfigError("\n  ".join([f"{document.name}: {len(lines)} problems", *lines]))


def translate(
    error: ValidationError, root: Any, prefix: KeyPath = (), skip: int = 0, elsewhere: Iterable[str] = ()
) -> Iterator[Problem]:
    """Problems from a validation of plain data against the type `root`.

    The first `skip` steps of pydantic's locations are replaced by `prefix`. `elsewhere` are key paths of the whole
    configuration, to tell where a key that is unknown here would belong.
    """
    everything = error.errors(include_url=False)
    found = everything[:_MOST_PROBLEMS]
    misspelt = {
        (*details["loc"][:-1], near)
        for details in found
        if details["type"] in _UNKNOWN_KEY
        for near in _nearest(str(details["loc"][-1]), keys_at(root, details["loc"][skip:-1]))
    }
    for details in found:
        if details["type"] == "missing" and details["loc"] in misspelt:
            continue
        inner = details["loc"][skip:]
        if inner and inner[-1] == "[key]":
            inner = inner[:-1]
        yield Problem((*prefix, *inner), _words(details, keys_at(root, inner[:-1]), elsewhere))
    if more := len(everything) - len(found):
        yield Problem(prefix, f"{more:,} more problems of this kind; correct these first")


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """Text for a name that does not exist, with the nearest that does."""
    valid = list(valid)
    near = _nearest(name, valid)
    hint = f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(valid) or 'none'}"
    return f"unknown {what}; {hint}"


def _nearest(name: str, valid: Iterable[str]) -> list[str]:
    """The valid name that is most like `name`, or nothing."""
    return difflib.get_close_matches(name, list(valid), n=1)


def _words(details: ErrorDetails, valid: Sequence[str], elsewhere: Iterable[str]) -> str:
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    if kind in _UNKNOWN_KEY:
        key = str(details["loc"][-1])
        homes = [path for path in elsewhere if path.rpartition(".")[2] == key]
        if homes and not _nearest(key, valid):
            return f"unknown key here; did you mean '{homes[0]}'?"
        return unknown("key", key, valid)
    if kind in ("missing", "missing_argument"):
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in _EXPECTED:
        # YAML takes 3 for a number and "a: b" for a section.
        hint = "; put quotes around it if it is text" if kind == "string_type" and value is not None else ""
        return f"expected {_EXPECTED[kind]}, got {described(value)}{hint}"
    if kind == "finite_number":
        return f"expected a finite number, got {described(value)}"
    if kind == "literal_error":
        near = _nearest(str(value), context["expected"].replace("'", "").replace(", ", " or ").split(" or "))
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"expected {context['expected']}, got {described(value)}{hint}"
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"must be {word} {context[name]}, got {described(value)}"
    if kind == "string_pattern_mismatch":
        return "a name has 1 to 64 letters, digits, '_', '.' or '-' and begins with a letter or digit"
    if kind == "too_short":
        return f"must hold at least {context['min_length']}, got {described(value)}"
    return f"{details['msg']}, got {described(value)}"


def described(value: Any) -> str:
    """A value of a YAML file as its writer would name it."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"text {_shortened(repr(value))}"
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return _shortened(json.dumps(value, default=str))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def keys_at(root: Any, path: Iterable[str | int]) -> list[str]:
    """Keys that the section at `path` may have; none where any name may stand."""
    section = _bare(root)
    for step in path:
        section = _bare(_inside(section, step))
    return list(_fields(section))


def key_paths(root: Any, expand: Callable[[str], Iterable[str]] = lambda _: ()) -> list[str]:
    """All key paths of a section type, with ``*`` for a free name; `expand` adds the keys below an open section."""
    return list(_walk(_bare(root), "", expand))


def _walk(section: Any, prefix: str, expand: Callable[[str], Iterable[str]]) -> Iterator[str]:
    for name, annotation in _fields(section).items():
        yield f"{prefix}{name}"
        inner = _bare(annotation)
        if get_origin(inner) is dict:
            inner, name = _bare(get_args(inner)[1]), f"{name}.*"
            yield f"{prefix}{name}"
        yield from _walk(inner, f"{prefix}{name}.", expand)
    yield from (f"{prefix}{name}" for name in expand(prefix.rstrip(".")))


def _fields(section: Any) -> dict[str, Any]:
    """Names and types of a section's fields; empty for anything else."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: info.annotation for name, info in section.model_fields.items()}
    if dataclasses.is_dataclass(section):
        hints = typing.get_type_hints(section)
        return {item.name: hints[item.name] for item in dataclasses.fields(section)}
    return {}


def _inside(section: Any, step: str | int) -> Any:
    if get_origin(section) is dict:
        return get_args(section)[1]
    if get_origin(section) in (list, tuple):
        return get_args(section)[0]
    return _fields(section).get(str(step))


def _bare(annotation: Any) -> Any:
    """The type without Annotated and without ``| None``."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            annotation = next((item for item in get_args(annotation) if item is not type(None)), None)
        else:
            return annotation

"""Sweeps: a list where a method's setting takes one value makes one method of each value, named by it."""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, get_args, get_origin

from lrag_ray.config.problems import Problem
from lrag_ray.config.source import Document, KeyPath
from lrag_ray.context.registry import policy_class
from lrag_ray.printable import counted

_LONGEST_PART = 64
"""Characters of a value in a name, which has no more in all."""
_MOST_METHODS = 100
"""Methods of one sweep; more than that is a slip."""


def expand_sweeps(document: Document) -> Iterator[Problem]:
    """Replace every swept section of `methods` by its methods, in place and in order; changes `document`.

    ``rag: {top_k: [2, 4]}`` becomes ``rag_top_k_2`` and ``rag_top_k_4``. Several lists make every combination. Sections
    that name no method are left to the validation.
    """
    group = document.data.get("methods")
    if not isinstance(group, dict):
        return
    expanded: dict[str, Any] = {}
    for name, section in group.items():
        swept = _swept(section)
        problems = [*_problems(("methods", name), swept)]
        yield from problems
        made = {name: section} if problems or not swept else _methods(name, section, swept)
        for other in made.keys() & expanded.keys():
            yield Problem(("methods", name), f"makes a method '{other}', and another section does so too")
        expanded |= made
        for other in made.keys() - {name}:
            _note_origins(document, name, other)
    document.data["methods"] = expanded


def _swept(section: Any) -> dict[str, list[Any]]:
    """Settings that are given as a list and take none."""
    if not isinstance(section, dict) or not isinstance(section.get("method"), str):
        return {}
    try:
        types = typing.get_type_hints(policy_class(section["method"]).Settings)
    except ValueError:
        return {}
    return {
        key: value
        for key, value in section.items()
        if isinstance(value, list) and key in types and not _takes_lists(types[key])
    }


def _takes_lists(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple) or any(_takes_lists(inner) for inner in get_args(annotation))


def _problems(path: KeyPath, swept: Mapping[str, list[Any]]) -> Iterator[Problem]:
    count = 1
    for key, values in swept.items():
        count *= len(values)
        if not values:
            yield Problem((*path, key), "is an empty list; a sweep needs at least one value")
        elif any(isinstance(value, list | dict) for value in values):
            yield Problem((*path, key), "a sweep lists plain values")
        elif len({_shown(value) for value in values}) < len(values):
            yield Problem((*path, key), f"holds values that would give methods of one name: {values}")
    if count > _MOST_METHODS:
        yield Problem(path, f"makes {counted(count, 'method')}; a sweep makes at most {_MOST_METHODS}")


def _methods(name: str, section: Mapping[str, Any], swept: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    made = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        title = "_".join([name, *(f"{key}_{_shown(value)}" for key, value in chosen.items())])
        made[title] = {**section, **chosen}
    return made


def _shown(value: Any) -> str:
    """A value as a part of a name: a file by its stem."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, str):
        return re.sub(r"[^A-Za-z0-9.-]+", "-", PurePosixPath(value).stem[:_LONGEST_PART])
    return format(value, "g") if isinstance(value, float) else str(value)


def _note_origins(document: Document, name: str, made: str) -> None:
    for path, place in list(document.origins.items()):
        if path[:2] == ("methods", name):
            document.origins[("methods", made, *path[2:])] = place

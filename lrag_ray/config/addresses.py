"""Every path or address that a configuration names, by its key, whatever section it is in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel

from lrag_ray.config.section import Address
from lrag_ray.config.source import KeyPath


def addresses_of(section: BaseModel, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Values of all fields of type `Address` that are given, in the order of the schema."""
    hints = get_type_hints(type(section), include_extras=True)
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, str) and (hints[name] == Address or Address in get_args(hints[name])):
            yield (*path, name), value
        else:
            yield from _inside(value, (*path, name))


def _inside(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, BaseModel):
        yield from addresses_of(value, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _inside(item, (*path, index))

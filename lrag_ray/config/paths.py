"""Paths of a configuration as every process of the cluster must see them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from lrag_ray.config.methods import resolve_method
from lrag_ray.config.schema import RunConfig, ScoringSection
from lrag_ray.config.source import KeyPath

Config = TypeVar("Config", bound=RunConfig)


def with_absolute_paths(config: Config) -> Config:
    """`config` with relative paths of weights resolved here: workers have working directories of their own."""
    data = config.model_dump()
    for path in _weights(config, data):
        _resolve(_section_of(data, path), str(path[-1]))
    return type(config).model_validate(data)


def beside_configuration(config: RunConfig, folder: Path) -> Iterator[tuple[KeyPath, str]]:
    """Relative paths, with their keys, of files that are missing here and are there relative to `folder`."""
    data = config.model_dump()
    for path in [("prompts", "path"), *_weights(config, data)]:
        address = (_section_of(data, path) or {}).get(str(path[-1]))
        if not isinstance(address, str) or "://" in address or Path(address).is_absolute():
            continue
        if not os.path.lexists(address) and os.path.lexists(folder / address):
            yield path, address


def _weights(config: RunConfig, data: dict[str, Any]) -> Iterator[KeyPath]:
    """Keys of all places of weights; puts those in `data` that are the defaults of a method's settings."""
    for name in config.backbones:
        for keys in (
            ("weights", "path"),
            ("weights", "lora", "path"),
            ("text_encoder", "path"),
            ("text_encoder", "tokenizer"),
            ("vae", "path"),
        ):
            yield ("backbones", name, *keys)
    for name, method in config.methods.items():
        for file, address in resolve_method(method).weights:
            data["methods"][name][file.key] = address
            yield ("methods", name, file.key)
    # ``random`` is a recipe, not a path.
    if config.scoring.weights != "random":
        yield ("scoring", "weights")


def _section_of(data: dict[str, Any], path: KeyPath) -> dict[str, Any] | None:
    section: Any = data
    for key in path[:-1]:
        section = section and section[key]
    return section  # type: ignore[no-any-return]  # sections of a validated configuration


def with_absolute_weights(scoring: ScoringSection) -> ScoringSection:
    """The same for a scoring section alone."""
    data = scoring.model_dump()
    if data["weights"] != "random":
        _resolve(data, "weights")
    return ScoringSection.model_validate(data)


def _resolve(section: dict[str, Any] | None, key: str) -> None:
    address = section and section.get(key)
    if section and isinstance(address, str) and "://" not in address:
        section[key] = str(Path(address).expanduser().absolute())

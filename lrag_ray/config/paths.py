"""Paths of a configuration as every process of the cluster must see them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.methods import resolve_method
from lrag_ray.config.schema import RunConfig, ScoringSection
from lrag_ray.config.source import KeyPath
from lrag_ray.config.training import TrainEncoderConfig

Config = TypeVar("Config", bound=JobConfig)
RANDOM = "random"
"""What `scoring.weights` says for weights that are drawn."""


def with_absolute_paths(config: Config) -> Config:
    """`config` with relative paths resolved here, of weights and loggers: workers have other working directories."""
    data = config.model_dump()
    files = _weights(config, data) if isinstance(config, RunConfig) else _training_addresses(config)
    for path in [*files, *_WATCH_FOLDERS]:
        _resolve(_section_of(data, path), path[-1])
    made: Config = type(config).model_validate(data)  # type: ignore[assignment]  # of the same type
    return made


def _training_addresses(config: TrainEncoderConfig) -> list[KeyPath]:
    return [*(("data", "uris", position) for position in range(len(config.data.uris))), ("training", "start_from")]


class Misplaced(NamedTuple):
    """A relative path that means nothing in the working directory."""

    key: KeyPath
    address: str
    folder: Path
    """Where it means something."""


def beside_configuration(config: JobConfig, folder: Path) -> Iterator[Misplaced]:
    """Relative paths of files that are missing here and are there relative to `folder`, or to one of two around it.

    Those are where a project keeps its configurations, whose paths begin at the project.
    """
    around = [folder, *Path(os.path.abspath(folder)).parents[:2]]  # noqa: PTH100 - without following links
    data = config.model_dump()
    paths: list[KeyPath]
    if isinstance(config, RunConfig):
        paths = [("prompts", "path"), *_weights(config, data)]
    else:
        paths = _training_addresses(config)
    for path in paths:
        section = _section_of(data, path)
        address = (section or {}).get(path[-1]) if isinstance(section, dict | None) else section[path[-1]]
        if not isinstance(address, str) or "://" in address or Path(address).is_absolute():
            continue
        if not os.path.lexists(address):
            found = next((each for each in around if os.path.lexists(each / address)), None)
            if found is not None:
                yield Misplaced(path, address, found)


def weight_paths(config: JobConfig) -> list[KeyPath]:
    """Keys of all places of weights and datasets that are given, by the configuration or a method's defaults."""
    data = config.model_dump()
    if not isinstance(config, RunConfig):
        return [path for path in _training_addresses(config) if _section_of(data, path)[path[-1]] is not None]
    return [path for path in _weights(config, data) if (_section_of(data, path) or {}).get(str(path[-1])) is not None]


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
    judge = config.scoring.settings.get("chat")
    for path, chat in (
        (("prompts", "refine"), data["prompts"]["refine"]),
        (("scoring", "settings", "chat"), judge if isinstance(judge, dict) else None),
    ):
        if chat is not None and chat.get("backend") == "local":
            yield (*path, "model")
    # ``random`` is a recipe, not a path.
    if config.scoring.weights != RANDOM:
        yield ("scoring", "weights")


def _section_of(data: dict[str, Any], path: KeyPath) -> Any:
    """The section or list of a validated configuration that holds the value at `path`."""
    section: Any = data
    for key in path[:-1]:
        section = section and section[key]
    return section


def with_absolute_weights(scoring: ScoringSection) -> ScoringSection:
    """The same for a scoring section alone."""
    data = scoring.model_dump()
    if data["weights"] != RANDOM:
        _resolve(data, "weights")
    return ScoringSection.model_validate(data)


def _resolve(section: Any, key: str | int) -> None:
    address = section and section[key]
    if section and isinstance(address, str) and "://" not in address:
        section[key] = str(Path(address).expanduser().absolute())


_WATCH_FOLDERS: list[KeyPath] = [
    ("watch", "tensorboard", "folder"),
    ("watch", "wandb", "folder"),
]
"""Folders of loggers."""

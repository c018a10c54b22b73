"""Paths of a configuration as every process of the cluster must see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrag_ray.config.methods import resolve_method
from lrag_ray.config.schema import RunConfig, ScoringSection


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """`config` with relative paths of weights resolved here: workers have working directories of their own."""
    data = config.model_dump()
    for backbone in data["backbones"].values():
        text_encoder, weights = backbone["text_encoder"], backbone["weights"]
        for section, key in (
            (weights, "path"),
            (weights["lora"], "path"),
            (text_encoder, "path"),
            (text_encoder, "tokenizer"),
            (backbone["vae"], "path"),
        ):
            _resolve(section, key)
    for name, section in data["methods"].items():
        for file, address in resolve_method(config.methods[name]).weights:
            # An address may be the settings' default, which no section holds.
            section[file.key] = address
            _resolve(section, file.key)
    _resolve_scoring(data["scoring"])
    return RunConfig.model_validate(data)


def with_absolute_weights(scoring: ScoringSection) -> ScoringSection:
    """The same for a scoring section alone."""
    data = scoring.model_dump()
    _resolve_scoring(data)
    return ScoringSection.model_validate(data)


def _resolve_scoring(section: dict[str, Any]) -> None:
    # ``random`` is a recipe, not a path.
    if section["weights"] != "random":
        _resolve(section, "weights")


def _resolve(section: dict[str, Any] | None, key: str) -> None:
    address = section and section.get(key)
    if section and isinstance(address, str) and "://" not in address:
        section[key] = str(Path(address).expanduser().absolute())

"""Folders as Diffusers and transformers write them: a config.json beside the weights.

The libraries run what a config.json names: classes in its folder (``auto_map``), attention kernels of a hub. Here it
gives sizes, and one that names code is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from lrag_ray.errors import WeightsError
from lrag_ray.text_file import MOST_CONFIG_BYTES, read_text

_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1024
_COUNTS = {"num_layers", "num_decoder_layers", "num_hidden_layers", "num_res_blocks"}
"""What a config repeats modules by."""
_ATTENTION = {None, "eager", "sdpa"}
"""Attention of the libraries themselves; any other name may be an address of code."""


def model_of_folder(folder: Path, kind: str, names: Set[str], build: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `build` makes on the meta device of the entries `names` of the folder's config.json.

    Raises WeightsError that calls the folder no Diffusers folder of a `kind`, for a config that is not there, not a
    JSON object, names code, or that nothing can be built from.
    """
    try:
        config = {name: value for name, value in read_config(folder / "config.json").items() if name in names}
        for name, value in config.items():
            _check_size(name, value)
        with torch.device("meta"):
            return build(config)
    except Exception as error:
        # Sizes from a stranger's file: the libraries raise anything over what cannot be.
        raise WeightsError(no_folder_of(folder, kind, str(error) or type(error).__name__)) from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of a stranger's folder. Raises ValueError or OSError; ValueError for one that names code."""
    if not path.exists():
        raise ValueError(f"{path.name} is not there")
    try:
        config = json.loads(read_text(path, "the sizes of the model", WeightsError, most_bytes=MOST_CONFIG_BYTES))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds a {type(config).__name__}, expected an object")
    named = [name for name in ("auto_map", "custom_pipelines", "chat_template") if config.get(name)]
    named += [
        name for name in ("attn_implementation", "_attn_implementation") if not _is_own_attention(config.get(name))
    ]
    if named:
        raise ValueError(f"{path.name} names code of its own ({', '.join(named)}), which is not run: remove that entry")
    return config


def _is_own_attention(name: object) -> bool:
    return name is None or (isinstance(name, str) and name in _ATTENTION)


def _check_size(name: str, value: Any) -> None:
    """ValueError for numbers that no model has: modules are made before weights show that they do not fit."""
    values = value if isinstance(value, list) else [value]
    if len(values) > _MAX_LAYERS:
        raise ValueError(f"config.json: {name} has {len(values):,} entries, expected at most {_MAX_LAYERS:,}")
    limit = _MAX_LAYERS if name in _COUNTS else _MAX_SIZE
    for number in values:
        if isinstance(number, int) and not 0 <= number <= limit:
            raise ValueError(f"config.json: {name} is {str(number)[:40]}, expected 0 to {limit:,}")


def no_folder_of(folder: Path, kind: str, reason: str) -> str:
    """Message for a folder that does not hold what it should."""
    return (
        f"{folder} is not a Diffusers folder of a {kind}: {reason}. "
        "Fix: fetch the folder again, or give the single file that is published"
    )

"""Folders as Diffusers and transformers write them: a config.json beside the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lrag_ray.errors import WeightsError


def model_of_folder(folder: Path, kind: str, build: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `build` makes on the meta device of the folder's config.json.

    Raises WeightsError that calls the folder no Diffusers folder of a `kind`, for a config that is not there, no JSON
    object, or that nothing can be built from.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"config.json holds a {type(config).__name__}, expected an object")
        with torch.device("meta"):
            return build(config)
    except Exception as error:
        # Sizes from a stranger's file: the libraries raise anything over what cannot be.
        raise WeightsError(no_folder_of(folder, kind, str(error) or type(error).__name__)) from error


def no_folder_of(folder: Path, kind: str, reason: str) -> str:
    """Message for a folder that does not hold what it should."""
    return (
        f"{folder} is no Diffusers folder of a {kind}: {reason}. "
        "Mend: fetch the folder again, or give the single file that is published"
    )

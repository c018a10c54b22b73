"""The official weight files of every network: where they are looked for and how they are read.

Nothing is downloaded here. Without a folder the caches of VBench, torch.hub, CLIP and DreamSim are searched.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.scoring.vbench_long.official import NETWORKS, OFFICIAL, NetworkName
from lrag_ray.text_file import MOST_CONFIG_BYTES, read_text
from lrag_ray.wan.state_dict import read_checkpoint


@dataclass(frozen=True)
class Weights:
    """The tensors of one network under their official names."""

    tensors: Mapping[str, Tensor]
    source: str
    """Where they come from, for messages."""
    lora_scale: float = 1.0
    """alpha / rank, for a LoRA."""


class WeightSource(Protocol):
    """Where networks get their weights: official files, or the recipe of the conformance vectors."""

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        """Weights of a network whose official names and shapes are those of `expected` (meta tensors)."""
        ...


@dataclass(frozen=True)
class WeightFiles:
    """Official files in `folder`, or in the usual caches where it is None."""

    folder: Path | None = None

    def places(self, name: NetworkName) -> list[Path]:
        """Where the file of a network is looked for, in order."""
        official = OFFICIAL[name]
        if self.folder is not None:
            return [self.folder / official.path]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        vbench = Path(os.environ.get("VBENCH_CACHE_DIR") or cache / "vbench")
        return [vbench / official.path, *([cache / official.elsewhere] if official.elsewhere else [])]

    @property
    def pull_command(self) -> str:
        """What brings the files to their first places."""
        folder = f" --folder {shlex.quote(str(self.folder))}" if self.folder else ""
        return f"lrag-ray weights pull --suite vbench_long{folder}"

    def find(self, name: NetworkName) -> Path:
        """The file of a network.

        Raises:
            WeightsError: it is in none of its places; names them and the source.
        """
        places = self.places(name)
        for place in places:
            if place.exists():
                return place
        official = OFFICIAL[name]
        tried = " and ".join(str(place) for place in places)
        inside = f" (in the archive: {official.member})" if official.member else ""
        raise WeightsError(
            f"no weights for {name}: nothing at {tried}. Fix: {self.pull_command}, or without network put "
            f"{official.url}{inside} there"
        )

    def missing(self) -> Iterator[NetworkName]:
        """Networks whose file is in none of its places."""
        for name in NETWORKS:
            if not any(place.exists() for place in self.places(name)):
                yield name

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        """Tensors of the official file, unwrapped and without prefixes; CLIP's text tower is left out.

        Raises:
            WeightsError: the file is missing, damaged, or holds more than tensors.
        """
        path = self.find(name)
        source = f"{path} (weights of {name})"
        try:
            if name == "dreamsim_ensemble_lora":
                return _read_lora(path, expected, source)
            content = _unwrap(read_checkpoint(path))
        except WeightsError as error:
            raise WeightsError(f"weights of {name}: {error}, with {self.pull_command} --again") from error
        content = {str(key).removeprefix("module."): value for key, value in content.items()}
        if name in ("clip_vitb32", "clip_vitl14"):
            content = {key: value for key, value in content.items() if key in expected}
        return Weights(_as_float32(content, expected, source), source)


def _as_float32(content: Mapping[str, Any], expected: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors in float32; those that do not fit stay as they are stored, for the message that lists them."""
    if other := [key for key, value in content.items() if not _is_dense(value)]:
        raise WeightsError(
            f"{source} holds {', '.join(other[:4])} where dense tensors are expected, so it is another file. "
            "Fix: give the published file"
        )
    fitting = {key for key, value in content.items() if key in expected and value.shape == expected[key].shape}
    return {
        key: value.float() if key in fitting and value.is_floating_point() else value for key, value in content.items()
    }


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _unwrap(content: dict[str, Any]) -> dict[str, Any]:
    """The state dict inside a checkpoint that also holds other things."""
    for key in ("state_dict", "params"):
        if isinstance(content.get(key), dict):
            return dict(content[key])
    return content


def _read_lora(folder: Path, expected: Mapping[str, Tensor], source: str) -> Weights:
    config_path = folder / "adapter_config.json"
    try:
        config = json.loads(read_text(config_path, "the LoRA's sizes", WeightsError, most_bytes=MOST_CONFIG_BYTES))
        scale = float(config["lora_alpha"] / config["r"])
        if not math.isfinite(scale):
            raise ValueError(f"lora_alpha / r is {scale}")
    except (WeightsError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise WeightsError(
            f"{config_path} does not say r and lora_alpha ({error}). Fix: unpack DreamSim's ensemble_lora again"
        ) from error
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((file for file in files if file.is_file()), files[0])
    return Weights(_as_float32(read_checkpoint(path), expected, source), source, scale)

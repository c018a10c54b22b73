"""Conversion to safetensors: what an actor would hold, in the form in which it maps it without unpacking.

A generator is written as it is used: EMA or not, LoRA merged, in the backbone's dtype. The latents stay the same bit
for bit, but the file is another one, so its digest, and with it the identity of a run, changes: convert before a run
is begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.weights.local import local_copy
from lrag_ray.weights.loras import local_lora
from lrag_ray.weights.needs import Need
from lrag_ray.weights.verify import missing

CONVERTED = ("transformer", "text_encoder", "vae")
"""Kinds that are converted; a LoRA goes into its transformer, tokenizers and weights of methods stay as they are."""


class Conversion(NamedTuple):
    """One file that was written, and the configuration that uses it."""

    source: str
    target: Path
    size_bytes: int
    settings: dict[str, str | bool | None]
    """Values by key path, for the configuration."""


def convert(need: Need, folder: Path) -> Conversion | None:
    """Write the safetensors form of one need below `folder`; None where there is nothing to convert.

    Raises WeightsError for a source that is missing or damaged, or a target that cannot be written.
    """
    if need.kind not in CONVERTED or need.backbone is None:
        return None
    source = local_copy(need.address)
    if source.is_dir() and need.kind != "transformer":
        return None
    if not source.exists():
        raise WeightsError(missing(need))
    target = folder / f"{_stem(need)}.safetensors"
    if target.exists() and source.exists() and target.samefile(source):
        return None
    settings: dict[str, str | bool | None] = {key: str(target) for key in need.keys}
    if need.kind == "transformer":
        weights, dtype = need.backbone.weights, getattr(torch, need.backbone.dtype)
        lora = local_lora(weights.lora) if weights.lora is not None else None
        model = load_transformer(source, need.backbone.transformer, use_ema=weights.use_ema, dtype=dtype, lora=lora)
        _write(model.state_dict(), target)
        at = [key.removesuffix(".path") for key in need.keys]
        settings |= {f"{key}.use_ema": False for key in at} | {f"{key}.lora": None for key in at if lora is not None}
    else:
        _write(_tensors(source), target)
    return Conversion(need.address, target, target.stat().st_size, settings)


def _stem(need: Need) -> str:
    """Name of the converted file: the backbone's for a generator, which depends on its settings; else the source's."""
    stem = need.name.rsplit(".", 1)[0]
    return f"{stem}-{need.keys[0].split('.')[1]}" if need.kind == "transformer" else stem


def _tensors(source: Path) -> dict[str, Tensor]:
    content = read_checkpoint(source)
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{source} holds more than tensors, so it is not a state dict. Fix: give the published file")
    return content


def _write(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Atomically, straight from the mapped source: the tensors are never copied in memory."""
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        part.replace(target)
    except OSError as error:
        raise WeightsError(f"{target} cannot be written: {error}. Fix: give another folder or make room") from error
    finally:
        part.unlink(missing_ok=True)

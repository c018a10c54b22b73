"""Checkpoints of the causal generators: which weights of the file are meant, and whether they fit.

A published file is a dict with ``generator``, ``generator_ema`` or ``model`` at the top; each is the state dict of a
diffusion wrapper, so that Wan's names stand behind ``model.``, and FSDP leaves ``_fsdp_wrapped_module.`` inside names.
A flat file (safetensors cannot nest) holds the tensors of one generator, or spells the top level as the first part of
every name. The public loader fills gaps with random weights when EMA is asked for; here nothing but a complete fit is
loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.lora import Lora, apply_lora
from lrag_ray.wan.state_dict import load_strict, read_checkpoint, refuse_non_finite, state_dict_digest, unwrapped
from lrag_ray.wan.transformer import CausalWanTransformer

__all__ = ["generator_weights", "load_transformer", "mapped_transformer", "state_dict_digest"]

_DIFFUSION_WRAPPER = "model."
_TOP_LEVEL = ("generator", "generator_ema", "model")


def load_transformer(
    path: str | Path,
    config: WanConfig,
    *,
    use_ema: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
) -> CausalWanTransformer:
    """Frozen generator from a checkpoint; `lora` is merged in float32 before the weights are cast to `dtype`.

    The module is built on the meta device and each tensor is read once, straight to its place: on the CPU a tensor
    that already has `dtype` stays mapped to the file. Raises WeightsError with everything that does not fit, and for
    values that are not finite.
    """
    transformer = mapped_transformer(path, config, use_ema=use_ema)
    if lora is not None:
        apply_lora(transformer, lora, dtype)
    transformer = transformer.to(device=device, dtype=dtype)
    merged = f" with LoRA {lora.path}" if lora is not None else ""
    # What was copied on the way is looked at where it went, so the file is read once all the same.
    refuse_non_finite(transformer.state_dict(), f"checkpoint {path}{merged}")
    return transformer.eval().requires_grad_(False)


def mapped_transformer(path: str | Path, config: WanConfig, *, use_ema: bool = False) -> CausalWanTransformer:
    """Generator whose tensors are mapped to the file as they are stored; none is read.

    Raises WeightsError with everything that does not fit, so it is also the check of a file.
    """
    with torch.device("meta"):
        transformer = CausalWanTransformer(config)
    weights = generator_weights(path, use_ema=use_ema)
    load_strict(transformer, weights, f"checkpoint {path} ({_looks_like(weights)})", _size_hint(weights, config))
    return transformer


def generator_weights(path: str | Path, *, use_ema: bool) -> dict[str, Tensor]:
    """Tensors of the generator that the options mean, under Wan's names, mapped to the file.

    A file of bare tensors holds one generator and `use_ema` makes no difference. Raises WeightsError if the file holds
    no generator, or not that one.
    """
    content = _nested(read_checkpoint(path))
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _wan_names(content, path)
    held = [key for key in _TOP_LEVEL if key in content]
    if "generator" in held or "generator_ema" in held:
        wanted = "generator_ema" if use_ema else "generator"
    else:
        wanted = "model"
    if wanted not in held:
        raise WeightsError(f"checkpoint {path}: {_absence(wanted, held, content)}")
    if not isinstance(content[wanted], Mapping):
        raise WeightsError(
            f"checkpoint {path}: '{wanted}' is a {type(content[wanted]).__name__}, expected a state dict. "
            "Mend: use the published file"
        )
    return _wan_names(content[wanted], path)


def _nested(content: dict[str, Any]) -> dict[str, Any]:
    """A flat file of several generators as a dict of state dicts; anything else as it is."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        top, _, rest = str(name).partition(".")
        if top not in ("generator", "generator_ema") or not rest:
            return content
        groups.setdefault(top, {})[rest] = value
    return groups or content


def _absence(wanted: str, held: list[str], content: Mapping[str, Any]) -> str:
    keys = ", ".join(sorted(map(str, content))[:8]) or "nothing"
    if not held:
        return (
            f"it holds {keys} at the top level, expected one of {', '.join(_TOP_LEVEL)}. "
            "Mend: use a generator checkpoint, or rename its top-level key"
        )
    return (
        f"it holds {' and '.join(held)}, but not {wanted}. "
        f"Mend: set use_ema: {str(wanted == 'generator').lower()}, or use another file"
    )


def _wan_names(state: Mapping[Any, Any], path: str | Path) -> dict[str, Tensor]:
    """Names without what training wrapped around the modules, and without the diffusion wrapper's prefix."""
    cleaned: dict[str, Tensor] = {}
    for key, value in state.items():
        name = unwrapped(str(key)).removeprefix(_DIFFUSION_WRAPPER)
        if name in cleaned:
            raise WeightsError(
                f"checkpoint {path} holds '{name}' twice once prefixes are removed (again as '{key}'). "
                "Mend: save one state dict alone"
            )
        cleaned[name] = value
    return cleaned


def _size_hint(weights: Mapping[str, Any], config: WanConfig) -> str:
    """The edit that would make the sizes fit, where the file tells them; else to fetch the file again."""
    differing = [f"{name}: {size}" for name, size in _sizes(weights) if size and getattr(config, name) != size]
    if differing:
        return f"set transformer sizes to those of the file ({', '.join(differing)}) or use another file"
    return "its sizes are right but its tensors are not: fetch the file again or use another one"


def _sizes(weights: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Sizes that the shapes tell."""
    layers = [int(found.group(1)) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))]
    yield "num_layers", max(layers, default=-1) + 1
    for name, axis, size in (
        ("patch_embedding.weight", 0, "dim"),
        ("blocks.0.ffn.0.weight", 0, "ffn_dim"),
        ("text_embedding.0.weight", 1, "text_dim"),
        ("time_embedding.0.weight", 1, "freq_dim"),
    ):
        tensor = weights.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() > axis:
            yield size, tensor.shape[axis]


def _looks_like(weights: Mapping[str, Any]) -> str:
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})) or "no numbers"
    sizes = ", ".join(f"{name} {size}" for name, size in _sizes(weights) if size)
    return f"{len(weights)} tensors of {dtypes}" + (f"; {sizes}" if sizes else "")

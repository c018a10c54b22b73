"""Checkpoints of the causal generators: which weights of the file are meant, and whether they fit.

A published file is a dict with ``generator``, ``generator_ema`` or ``model`` at the top; each is the state dict of a
diffusion wrapper, so that Wan's names stand behind ``model.``, and FSDP leaves ``_fsdp_wrapped_module.`` inside names.
A flat file (safetensors cannot nest) holds the tensors of one generator, or spells the top level as the first part of
every name. ComfyUI's ``diffusion_model.`` is dropped, and Diffusers' names, in a file or a `transformer` folder, are
mapped to Wan's. The public loader fills gaps with random weights when EMA is asked for; here nothing but a complete fit
is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.text_file import MOST_CONFIG_BYTES, read_text
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.lora import Lora, apply_lora
from lrag_ray.wan.names import bare_name, is_diffusers, wan_name
from lrag_ray.wan.state_dict import load_strict, misfits, refuse_non_finite, state_dict_digest
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.weight_parts import read_weights

__all__ = ["generator_weights", "load_transformer", "mapped_transformer", "state_dict_digest"]

_TOP_LEVEL = ("generator", "generator_ema", "model")
_BUNDLED = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")
"""Other networks in one file with the generator, as ComfyUI bundles them."""
_LORA_KEY = re.compile(r"\.(?:lora_(?:A|B|down|up|magnitude_vector)|lora\.(?:down|up)|dora_scale)\b")
_QUANTISED = re.compile(
    r"(?:scale_weight|scale_input|weight_scale|input_scale|scaled_fp8|absmax|quant_map|qweight|qzeros)\b"
)
_CONFIG_KEYS = {
    "num_attention_heads": "num_heads",
    **{name: name for name in ("dim", "eps", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_dim")},
    "text_len": "text_len",
    "patch_size": "patch_size",
}
"""Entries of a folder's config.json, as Diffusers and Wan call them, and of `WanConfig`."""


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
    _check_folder_config(Path(path), config)
    weights = generator_weights(path, use_ema=use_ema)
    expected = transformer.state_dict()
    hint = _hint(weights, config, expected) if misfits(weights, expected) else ""
    load_strict(transformer, weights, f"checkpoint {path} ({_looks_like(weights)})", hint)
    return transformer


def _check_folder_config(path: Path, config: WanConfig) -> None:
    """WeightsError where the config.json of a folder contradicts `config`: the number of heads leaves shapes alike."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return
    try:
        stated = json.loads(read_text(file, "the sizes of the checkpoint", WeightsError, most_bytes=MOST_CONFIG_BYTES))
        if not isinstance(stated, dict):
            raise ValueError(f"it holds a {type(stated).__name__}, expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"checkpoint {path}: config.json cannot be read ({error}). Fix: use the config.json of the release, or "
            "remove it: the transformer section gives the sizes"
        ) from error
    wrong = {}
    for theirs, ours in _CONFIG_KEYS.items():
        value, wanted = stated.get(theirs), getattr(config, ours)
        if value is not None and value != (list(wanted) if isinstance(wanted, tuple) else wanted):
            wrong[ours] = value
    if wrong:
        listed = ", ".join(f"{name}: {value}" for name, value in wrong.items())
        raise WeightsError(
            f"checkpoint {path}: its config.json says {listed}, the configuration "
            f"{', '.join(f'{name}: {getattr(config, name)}' for name in wrong)}. "
            "Fix: set these keys of the transformer section to those of the file, or use another one"
        )


def generator_weights(path: str | Path, *, use_ema: bool) -> dict[str, Tensor]:
    """Tensors of the generator that the options mean, under Wan's names, mapped to the file.

    A file of bare tensors (or a folder of them) holds one generator and `use_ema` makes no difference. Raises
    WeightsError if the file holds no generator, or not that one.
    """
    content = _nested(read_weights(path, "checkpoint"))
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
            "Fix: use the published file"
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
        nested = [name for name, value in content.items() if isinstance(value, Mapping) and value]
        if "generator_lora" in nested:
            fix = "weights.lora.path takes this LoRA; give the checkpoint that it was trained on"
        elif len(nested) == 1 and any(isinstance(value, Tensor) for value in content[nested[0]].values()):
            fix = f"give a generator checkpoint, or rename {nested[0]} to generator if it is one"
        else:
            fix = "give a generator checkpoint"
        return f"it holds {keys} at the top level, expected one of {', '.join(_TOP_LEVEL)}. Fix: {fix}"
    return (
        f"it holds {' and '.join(held)}, but not {wanted}. "
        f"Fix: set use_ema: {str(wanted == 'generator').lower()}, or use another file"
    )


def _wan_names(state: Mapping[Any, Any], path: str | Path) -> dict[str, Tensor]:
    """Names without what training wrapped around the modules and what others put in front, Diffusers' names as Wan's.

    Raises WeightsError for names that occur twice then, and for a generator with its LoRA still around it.
    """
    kept = {key: bare_name(str(key)) for key in state if not str(key).startswith(_BUNDLED)}
    if wrapped := sum(".base_layer." in name for name in kept.values()):
        if halves := sum(_LORA_KEY.search(name) is not None for name in kept.values()):
            raise WeightsError(
                f"checkpoint {path} was saved with its LoRA around it by PEFT ({wrapped} base_layer tensors, {halves} "
                "of the LoRA), without its alpha. Fix: merge it first, with PEFT's merge_and_unload(), and save that"
            )
        kept = {key: name.replace(".base_layer.", ".") for key, name in kept.items()}
    if is_diffusers(kept.values()):
        kept = {key: wan_name(name) for key, name in kept.items()}
    cleaned: dict[str, Tensor] = {}
    for key, name in kept.items():
        if name in cleaned:
            raise WeightsError(
                f"checkpoint {path} holds '{name}' twice once prefixes are removed (again as '{key}'). "
                "Fix: save one state dict alone"
            )
        cleaned[name] = state[key]
    return cleaned


def _hint(weights: Mapping[str, Any], config: WanConfig, expected: Mapping[str, Tensor]) -> str:
    """What to do about weights that do not fit: what they are instead, or the sizes with which they fit."""
    if kind := _other_kind(weights):
        return f"{kind}; give the checkpoint of a causal Wan generator"
    sizes = dict(_sizes(weights))
    if sizes.get("dim", config.dim) != config.dim and sizes["dim"] % config.head_dim == 0:
        sizes["num_heads"] = sizes["dim"] // config.head_dim
    differing = {name: size for name, size in sizes.items() if getattr(config, name) != size}
    # Advice must hold: the sizes are named only if everything fits with them.
    if differing and _fits_with(weights, config, differing):
        listed = ", ".join(f"{name}: {size}" for name, size in differing.items())
        return f"set transformer sizes to those of the file ({listed}) or use another file"
    here = len(expected.keys() & weights.keys())
    if 0 < here < len(expected):
        return (
            f"{here} of the generator's {len(expected)} tensors are there, so the file may be one part of several; "
            "give the folder of all parts, or a file that holds all"
        )
    return "give the checkpoint of a causal Wan generator"


def _fits_with(weights: Mapping[str, Any], config: WanConfig, sizes: Mapping[str, Any]) -> bool:
    try:
        other = dataclasses.replace(config, **sizes)
        with torch.device("meta"):
            return other.num_layers <= _MOST_LAYERS and not misfits(weights, CausalWanTransformer(other).state_dict())
    except (ValueError, RuntimeError):
        return False


_MOST_LAYERS = 200


def _other_kind(names: Iterable[str]) -> str | None:
    """What a file is instead of a generator, by the names in it; None where they do not say."""
    names = list(names)
    first = {name.split(".", 1)[0] for name in names}
    if any(_QUANTISED.search(name) for name in names):
        return "the file is quantised (it holds scales beside the weights), and only plain weights are read"
    if any(_LORA_KEY.search(name) for name in names) or any(name.startswith("lora_") for name in names):
        return "the file is a LoRA, which weights.lora.path takes beside the checkpoint that it was trained on"
    if first & {"token_embedding", "shared"} or any(name.startswith("encoder.block.") for name in names):
        return "the file is a umT5 text encoder, which text_encoder.path takes"
    if first & {"quant_conv", "post_quant_conv"} or any(re.match(r"(?:encoder|decoder)\.conv", name) for name in names):
        return "the file is a VAE or a retrieval encoder, which vae.path and a method's encoder take"
    if any(re.search(r"(?:^img_emb\.|image_embedder|_img\b|add_[kv]_proj)", name) for name in names):
        return "the file is an image-to-video generator, and only text-to-video ones are run"
    if any(name.startswith(("vace_", "control_adapter", "ref_conv")) for name in names):
        return "the file is a Wan generator with control inputs, and only text-to-video ones are run"
    return None


def _sizes(weights: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Sizes that the shapes show."""
    layers = [int(found.group(1)) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))]
    if layers:
        yield "num_layers", max(layers) + 1
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

"""LoRA: low-rank updates of linear layers, merged when the generator is loaded.

The merged weight is W + alpha / rank · B A. A file spells the layers as LongLive (``generator_lora``), PEFT, Diffusers,
ComfyUI or kohya do, for all linear layers or some. Its strength is what it says itself (``.alpha`` keys, an
``adapter_config.json`` beside it, the metadata of safetensors); a file that says nothing is merged with alpha equal to
the rank, as the loaders of those programs do. Whatever else a file holds is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.text_file import MOST_CONFIG_BYTES, read_text
from lrag_ray.wan.lora_settings import AdapterSettings, adapter_settings, metadata_settings, stored_settings
from lrag_ray.wan.names import bare_name, from_underscores, wan_name
from lrag_ray.wan.state_dict import misfits, read_checkpoint
from lrag_ray.wan.weight_parts import weight_files

_KEY = re.compile(
    r"(?P<layer>.+)\."
    r"(?P<half>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>\w+))?(?:\.weight)?"
)
_OLD_PROCESSOR = re.compile(
    r"(?P<layer>.+)\.processor\.(?P<projection>to_[qkv]|to_out)_lora\.(?P<half>down|up)\.weight"
)
_KOHYA = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_(?P<layer>\w+)")
_TEXT = ("lora_te", "text_encoder", "cond_stage_model.", "text_model.", "conditioner.")
_REFUSED: tuple[tuple[str, str], ...] = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA (it also rescales the columns of the weights)"),
    (r"\bhada_w|\bhada_t", "a LoHa (products of low-rank matrices)"),
    (r"\blokr_w|\blokr_t", "a LoKr (Kronecker products)"),
    (r"\blora_mid\b|\blora_t2\b", "a LoRA in Tucker form"),
    (r"\b(?:oft_|boft_|ia3_l|vera_lambda)", "an adapter of another method than LoRA"),
    (r"\.diff(?:_b|_m)?$", "a LoRA with whole weight or bias differences (.diff, .diff_b)"),
    (r"\blora_(?:B|up)(?:\.\w+)?\.bias$|\blora_(?:A|down)(?:\.\w+)?\.bias$", "a LoRA with biases"),
    (r"\bmodules_to_save\b", "a LoRA with whole layers trained beside it (modules_to_save)"),
    (r"\blora_embedding_[AB]\b", "a LoRA of an embedding"),
)


class Lora(NamedTuple):
    """A LoRA file and what the configuration says of its strength."""

    path: str | Path
    """The file, or a folder that holds one."""
    rank: int | None = None
    """Rank that the file must have; None takes any."""
    alpha: float | None = None
    """Scaling numerator, for a file that states none; None takes the file's, else the rank."""
    adapter_config: Path | None = None
    """PEFT's adapter_config.json, where it is not beside the file."""


class LoraUpdate(NamedTuple):
    """The update of one layer."""

    down: Tensor
    """A [rank, in]."""
    up: Tensor
    """B [out, rank]."""
    alpha: float
    """Scaling numerator."""

    @property
    def rank(self) -> int:
        """Width between the halves."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


class _Found(NamedTuple):
    """What a file holds, by Wan's name of the layer."""

    halves: dict[str, Tensor]
    """``<layer>.A`` and ``<layer>.B``."""
    alphas: dict[str, float]
    spelled: dict[str, str]
    """The layer's name as the file spells it."""
    settings: list[AdapterSettings]


def lora_targets(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The layers that LongLive's LoRA updates: every linear layer inside the transformer blocks, by name."""
    return {name: layer for name, layer in _linear_layers(transformer).items() if name.startswith("blocks.")}


def _linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def read_lora(lora: Lora) -> dict[str, LoraUpdate]:
    """Every update by Wan's name of its layer, with its strength resolved.

    Raises WeightsError for a file of another kind, halves without their other half, and for strengths or ranks that
    contradict each other or the configuration.
    """
    found = _read(lora)
    layers = sorted({name.rpartition(".")[0] for name in found.halves})
    lonely = [name for layer in layers for name in (f"{layer}.A", f"{layer}.B") if name not in found.halves]
    lonely += [f"{layer}.A" for layer in found.alphas if layer not in layers]
    if lonely:
        raise WeightsError(
            f"LoRA {lora.path} holds halves without the other half: missing {len(lonely)}: {', '.join(lonely[:8])}. "
            "Fix: give the whole file"
        )
    updates = {}
    for layer in layers:
        down, up = found.halves[f"{layer}.A"], found.halves[f"{layer}.B"]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
            raise WeightsError(
                f"LoRA {lora.path}: the halves of {layer} are {list(down.shape)} and {list(up.shape)}, expected "
                "[rank, in] and [out, rank] of a linear layer. Fix: give the LoRA of this generator"
            )
        updates[layer] = LoraUpdate(down, up, _alpha(lora, found, layer, down.shape[0]))
    _check_rank(lora, updates)
    return updates


def fitting_lora(transformer: nn.Module, lora: Lora) -> dict[str, LoraUpdate]:
    """What `read_lora` gives, if it fits the layers of `transformer`, which may be on the meta device.

    Raises WeightsError that lists the updates without a layer and those of other shapes.
    """
    updates = read_lora(lora)
    layers = _linear_layers(transformer)
    expected = {}
    for name in updates.keys() & layers.keys():
        rank = updates[name].rank
        expected[f"{name}.A"] = torch.empty(rank, layers[name].in_features, device="meta")
        expected[f"{name}.B"] = torch.empty(layers[name].out_features, rank, device="meta")
    if wrong := misfits(lora_tensors(updates), expected):
        listed = "\n  ".join(wrong)
        raise WeightsError(
            f"LoRA {lora.path} does not fit the generator's {len(layers)} linear layers:\n  {listed}\n"
            "Fix: give the LoRA of this generator"
        )
    return updates


def lora_tensors(updates: Mapping[str, LoraUpdate]) -> dict[str, Tensor]:
    """Both halves of every update, keyed ``<layer>.A`` and ``<layer>.B``."""
    return {f"{name}.{half}": value for name, it in updates.items() for half, value in (("A", it.down), ("B", it.up))}


def lora_strength(updates: Mapping[str, LoraUpdate]) -> str:
    """For people: number of layers, ranks and scales."""
    ranks = ", ".join(map(str, sorted({update.rank for update in updates.values()})))
    scales = ", ".join(f"{scale:g}" for scale in sorted({update.scale for update in updates.values()}))
    return f"{len(updates)} layers, rank {ranks}, scale {scales}"


@torch.no_grad()
def apply_lora(transformer: nn.Module, lora: Lora, dtype: torch.dtype) -> None:
    """Merge a LoRA into the linear layers of `transformer`, in float32, and leave their weights in `dtype`.

    Raises WeightsError where it does not fit (see `fitting_lora`).
    """
    updates = fitting_lora(transformer, lora)
    layers = _linear_layers(transformer)
    # One buffer for all layers: float32 copies of their own would leave the heap a quarter larger than the weights.
    scratch = torch.empty(max(layers[name].weight.numel() for name in updates), dtype=torch.float32)
    for name, update in updates.items():
        layer = layers[name]
        merged = scratch[: layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)
        merged.addmm_(update.up.float(), update.down.float(), alpha=update.scale)
        layer.weight = nn.Parameter(merged.to(dtype, copy=True), requires_grad=layer.weight.requires_grad)


def _read(lora: Lora) -> _Found:
    file = _file(Path(lora.path))
    content = read_checkpoint(file)
    state = content.get("generator_lora", content)
    settings = stored_settings(content, str(file))
    stored = {key for key, value in content.items() if isinstance(value, (int, float, str))} | settings.keys()
    if not isinstance(state, Mapping):
        raise WeightsError(f"LoRA {file}: 'generator_lora' is a {type(state).__name__}, expected a dict of tensors")
    found = _Found({}, {}, {}, [])
    adapters: set[str] = set()
    strange: list[str] = []
    for key, value in state.items():
        name = str(key)
        if state is content and name in stored:
            continue
        _refuse(name, file)
        if name.endswith(".alpha"):
            layer = _layer(name.removesuffix(".alpha"))
            if layer is None:
                strange.append(name)
            else:
                found.alphas[layer] = _number(value, name, file)
            continue
        spelled, half, adapter = _parsed(name)
        layer = _layer(spelled)
        if layer is None or half is None or not isinstance(value, Tensor):
            strange.append(name)
            continue
        if f"{layer}.{half}" in found.halves and adapter in adapters:
            raise WeightsError(
                f"LoRA {file} holds the update of {layer} twice (again as {name}). Fix: save one LoRA alone"
            )
        adapters.add(adapter)
        found.halves[f"{layer}.{half}"] = value
        found.spelled[layer] = spelled
    if len(adapters) > 1:
        named = ", ".join(sorted(name or "unnamed" for name in adapters))
        raise WeightsError(f"LoRA {file} holds {len(adapters)} adapters ({named}). Fix: save one of them alone")
    if strange or not found.halves:
        held = ", ".join(strange[:8]) or "nothing"
        raise WeightsError(
            f"LoRA {file} holds {held}; expected pairs of '<layer>.lora_A.weight' and '<layer>.lora_B.weight' (PEFT, "
            "Diffusers, ComfyUI) or of lora_down and lora_up (kohya). Fix: give the LoRA file of this generator"
        )
    found.settings.extend(_settings(lora, file, keys=bool(found.alphas)))
    found.settings.extend(each for of_entry in settings.values() for each in of_entry)
    return found


def _file(path: Path) -> Path:
    """The LoRA file that a path means: of a folder, the one in it."""
    if not path.is_dir():
        return path
    files = weight_files(path) or sorted([*path.glob("*.pt"), *path.glob("*.pth")])
    if len(files) != 1:
        held = ", ".join(file.name for file in files[:8]) or "no weights file"
        raise WeightsError(f"LoRA {path} is a folder with {held}. Fix: give the LoRA file in it")
    return files[0]


def _refuse(name: str, file: Path) -> None:
    if name.startswith(_TEXT):
        raise WeightsError(
            f"LoRA {file} also updates a text encoder ({name}), which is not done here. "
            "Fix: give a file that holds the updates of the transformer alone"
        )
    for pattern, what in _REFUSED:
        if re.search(pattern, name):
            raise WeightsError(
                f"LoRA {file} is {what}: it holds {name}. Fix: merge it into the generator with the program that made "
                "it, and give the merged checkpoint"
            )


def _parsed(name: str) -> tuple[str, str | None, str]:
    """Layer as spelled, half (A or B; None for another key) and adapter name of a key."""
    if match := _OLD_PROCESSOR.fullmatch(name):
        inner = "to_out.0" if match["projection"] == "to_out" else match["projection"]
        return f"{match['layer']}.{inner}", "A" if match["half"] == "down" else "B", ""
    if match := _KEY.fullmatch(name):
        return match["layer"], "A" if match["half"].endswith(("_A", "down")) else "B", match["adapter"] or ""
    return name, None, ""


def _layer(spelled: str) -> str | None:
    """Wan's name of a layer; None where kohya's spelling means none."""
    if match := _KOHYA.fullmatch(spelled):
        return from_underscores(match["layer"])
    return wan_name(bare_name(spelled))


def _number(value: Any, name: str, file: Path) -> float:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta else value
    if isinstance(number, (int, float)) and math.isfinite(number) and number != 0:
        return float(number)
    shown = f"{number}" if isinstance(number, (int, float)) else f"a {type(value).__name__}"
    raise WeightsError(
        f"LoRA {file}: {name} is {shown}, which loaders read differently; expected a number other than 0. "
        "Fix: store the alpha that it was trained with"
    )


def _settings(lora: Lora, file: Path, *, keys: bool) -> Iterator[AdapterSettings]:
    """What is said of the strength beside the tensors.

    Metadata that trainers leave, such as kohya's, counts only without ``.alpha`` keys, which tools that resize a LoRA
    keep right.
    """
    beside = lora.adapter_config or file.with_name("adapter_config.json")
    if beside.exists():
        content = read_text(beside, "the LoRA's settings", WeightsError, most_bytes=MOST_CONFIG_BYTES)
        yield adapter_settings(_json(content, beside), str(beside))
    metadata = _metadata(file)
    if "lora_adapter_metadata" in metadata:
        source = f"lora_adapter_metadata of {file}"
        stated = _json(metadata["lora_adapter_metadata"], source)
        # Diffusers puts the name of the pipeline's part in front; without one, the entries are the transformer's.
        of_part = {key.removeprefix("transformer."): entry for key, entry in stated.items() if _is_transformer(key)}
        yield adapter_settings(of_part, source)
    if not keys:
        yield from metadata_settings(metadata, str(file))


def _is_transformer(key: str) -> bool:
    return key.startswith("transformer.") or "." not in key


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        # Not a safetensors file; one that is damaged was refused before.
        return {}


def _json(content: str, source: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"LoRA: {source} cannot be read ({error}). Fix: use the file that PEFT wrote") from error
    return value


def _alpha(lora: Lora, found: _Found, layer: str, rank: int) -> float:
    """Scaling numerator of a layer: what the file says, else the configuration, else the rank."""
    stated = [(f"its key {layer}.alpha", found.alphas[layer])] if layer in found.alphas else []
    for settings in found.settings:
        spelled = bare_name(found.spelled[layer])
        settings.check_rank(lora.path, spelled, layer, rank)
        alpha = settings.alpha_of(spelled, layer, rank)
        if alpha is not None:
            stated.append((settings.source, alpha))
    for source, alpha in stated[1:]:
        if not _alike(alpha, stated[0][1]):
            raise WeightsError(
                f"LoRA {lora.path}: {stated[0][0]} says alpha {stated[0][1]:g}, {source} says {alpha:g} ({layer}). "
                "Fix: use the file and the settings of one training"
            )
    if not stated:
        return float(rank) if lora.alpha is None else lora.alpha
    source, alpha = stated[0]
    if lora.alpha is not None and not _alike(lora.alpha, alpha):
        raise WeightsError(
            f"LoRA {lora.path}: {source} says alpha {alpha:g} (scale {alpha / rank:g}), the configuration says "
            f"{lora.alpha:g}. Fix: leave out lora.alpha, which then is that of the file"
        )
    return alpha if lora.alpha is None else lora.alpha


def _alike(one: float, other: float) -> bool:
    """Whether two alphas are one number, perhaps stored in bfloat16."""
    return math.isclose(one, other, rel_tol=2**-8)


def _check_rank(lora: Lora, updates: Mapping[str, LoraUpdate]) -> None:
    ranks = sorted({update.rank for update in updates.values()})
    if lora.rank is not None and ranks != [lora.rank]:
        raise WeightsError(
            f"LoRA {lora.path}: the file has rank {' and '.join(map(str, ranks))}, the configuration says {lora.rank}. "
            "Fix: leave out lora.rank, which then is that of the file"
        )

"""What is said of a LoRA's ranks and strength beside its tensors.

That is PEFT's adapter_config.json (or Diffusers' metadata of the same content), the settings that a trainer saves in
the file, and the metadata of safetensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrag_ray.errors import WeightsError

_REFUSED = {
    "use_dora": "DoRA, which also rescales the columns of the weights",
    "fan_in_fan_out": "weights stored transposed (fan_in_fan_out)",
    "lora_bias": "a LoRA with biases (lora_bias)",
    "modules_to_save": "whole layers trained beside the LoRA (modules_to_save)",
    "layer_replication": "repeated layers (layer_replication)",
    "target_parameters": "updates of bare parameters (target_parameters)",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "an aLoRA",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_RANKS = ("r", "rank", "lora_rank", "network_dim", "ss_network_dim")
_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
"""What trainers call them."""
_MOST_NESTED = 8
_LITERAL = re.compile(r"[\w.\-]+")
_MAX_PATTERN = 200


@dataclass(frozen=True)
class AdapterSettings:
    """Ranks and alphas as one source states them."""

    source: str
    rank: int | None
    alpha: float | None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    """The scale is alpha / sqrt(rank)."""

    def alpha_of(self, spelled: str, layer: str, rank: int) -> float | None:
        """Numerator over `rank` for a layer, by its name in the file and Wan's; None where the source states none."""
        alpha = _matching(self.alpha_pattern, spelled, layer)
        if alpha is None:
            alpha = self.alpha
        return alpha * math.sqrt(rank) if alpha is not None and self.use_rslora else alpha

    def check_rank(self, path: str | Path, spelled: str, layer: str, rank: int) -> None:
        """WeightsError where the source states another rank for the layer than the tensors have."""
        stated = _matching(self.rank_pattern, spelled, layer) or self.rank
        if stated is not None and stated != rank:
            raise WeightsError(
                f"LoRA {path}: {self.source} says rank {stated:g} for {layer}, the tensors have {rank}. "
                "Fix: use the file and the settings of one training"
            )


def adapter_settings(config: Mapping[str, Any], source: str) -> AdapterSettings:
    """Settings from the entries of an adapter_config.json.

    Raises WeightsError for another method than plain LoRA, which is named, and for values that are not numbers.
    """
    kind = str(config.get("peft_type") or "LORA").upper()
    refused = [f"{kind} instead of LoRA"] if kind != "LORA" else []
    refused += [what for key, what in _REFUSED.items() if config.get(key)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        refused.append(f"a LoRA that changed the base weights when its training began (init_lora_weights: {init})")
    if config.get("bias") not in (None, "none"):
        refused.append(f"trained biases (bias: {config['bias']})")
    if refused:
        raise WeightsError(
            f"LoRA: {source} names {' and '.join(refused)}. Fix: merge it into the generator with the program that "
            "made it, and give the merged checkpoint"
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    numbers = [rank, alpha, *_values(ranks, source), *_values(alphas, source)]
    for number in numbers:
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf
        ):
            raise WeightsError(
                f"LoRA: {source} gives {number!r} as a rank or alpha, expected a number above 0. "
                "Fix: use the file that PEFT wrote"
            )
    return AdapterSettings(source, rank, alpha, ranks, alphas, bool(config.get("use_rslora")))


def stored_settings(content: Mapping[str, Any], file: str) -> dict[str, list[AdapterSettings]]:
    """Settings among the entries of a checkpoint, by the entry that holds them.

    An alpha counts beside the tensors; further inside, where the same mapping states a rank, because a trainer's whole
    configuration has other alphas too.

    Raises WeightsError as `adapter_settings`.
    """
    found = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            if inside := list(_nested(value, f"entry {name} of {file}")):
                found[name] = inside
        elif name in _ALPHAS and not hasattr(value, "shape"):
            rank = next((content[key] for key in _RANKS if isinstance(content.get(key), (int, float))), None)
            found[name] = [adapter_settings({"r": rank, "lora_alpha": value}, f"entry {name} of {file}")]
    return found


def metadata_settings(metadata: Mapping[str, str], file: str) -> Iterator[AdapterSettings]:
    """Settings in the metadata of a safetensors file, as numbers or as JSON.

    Raises WeightsError as `adapter_settings`.
    """
    rank = next((number for key in _RANKS if (number := _spelled_number(metadata.get(key)))), None)
    for name in _ALPHAS:
        if alpha := _spelled_number(metadata.get(name)):
            yield adapter_settings({"r": rank, "lora_alpha": alpha}, f"{name} of {file}")
    for name, text in metadata.items():
        if name == "lora_adapter_metadata" or not text.startswith("{"):
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            # Notes of the trainer, in whatever form.
            continue
        yield from _nested(value, f"{name} of {file}")


def _nested(config: Mapping[str, Any], source: str, depth: int = 0) -> Iterator[AdapterSettings]:
    rank, alpha = (next((key for key in keys if key in config), None) for keys in (_RANKS, _ALPHAS))
    if rank is not None and alpha is not None:
        yield adapter_settings({**config, "r": config[rank], "lora_alpha": config[alpha]}, source)
    for value in config.values():
        if isinstance(value, Mapping) and depth < _MOST_NESTED:
            yield from _nested(value, source, depth + 1)


def _spelled_number(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if math.isfinite(number) and number != 0 else None


def _values(pattern: Any, source: str) -> list[Any]:
    try:
        if not isinstance(pattern, dict) or any(len(key) > _MAX_PATTERN for key in pattern):
            raise ValueError("it must be an object of short patterns")
        for key in pattern:
            re.compile(key)
    except (ValueError, re.error) as error:
        raise WeightsError(
            f"LoRA: {source}: rank_pattern or alpha_pattern cannot be read ({error}). Fix: use the file that PEFT wrote"
        ) from error
    return list(pattern.values())


def _matching(pattern: Mapping[str, Any], spelled: str, layer: str) -> Any:
    """The value for a layer: of the first key that is its name's end, or as a regular expression matches it."""
    for key, value in pattern.items():
        for name in (spelled, layer):
            if _LITERAL.fullmatch(key):
                # A dot stands for any character in PEFT's expressions; in names it is a dot.
                if name == key or name.endswith(f".{key}"):
                    return value
            elif re.match(rf"(.*\.)?({key})$", name):
                return value
    return None

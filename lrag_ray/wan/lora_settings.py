"""What PEFT's adapter_config.json (or Diffusers' metadata of the same content) says of a LoRA's ranks and strength."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
                f"LoRA {path}: {self.source} says rank {stated} for {layer}, the tensors have {rank}. "
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
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0):
            raise WeightsError(
                f"LoRA: {source} gives {number!r} as a rank or alpha, expected a number above 0. "
                "Fix: use the file that PEFT wrote"
            )
    return AdapterSettings(source, rank, alpha, ranks, alphas, bool(config.get("use_rslora")))


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

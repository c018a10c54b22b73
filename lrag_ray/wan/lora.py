"""LoRA: low-rank updates of the linear layers inside the transformer blocks, merged when the generator is loaded.

A file is a bare dict with ``base_model.model.<layer>.lora_A.weight`` [rank, in] and ``….lora_B.weight`` [out, rank], or
that dict under ``generator_lora``. The merged weight is W + alpha / rank · B A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.wan.state_dict import misfits, read_checkpoint, unwrapped

_KEY = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(?P<layer>.+)\.lora_(?P<half>[AB])\.(?:default\.)?weight")


class Lora(NamedTuple):
    """A LoRA file and how it was trained."""

    path: str | Path
    """The file, raw or wrapped."""
    rank: int = 256
    """Rank of the update."""
    alpha: float = 256.0
    """Scaling numerator."""


def lora_targets(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The layers that a LoRA updates: every linear layer inside the transformer blocks, by name."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }


def read_lora(path: str | Path) -> dict[str, Tensor]:
    """Both halves of every update, keyed ``<layer>.A`` and ``<layer>.B``. Raises WeightsError for another file."""
    content = read_checkpoint(path)
    state = content.get("generator_lora", content)
    if not isinstance(state, Mapping):
        raise WeightsError(f"LoRA {path}: 'generator_lora' is a {type(state).__name__}, expected a dict of tensors")
    halves: dict[str, Tensor] = {}
    strange: list[str] = []
    for key, value in state.items():
        match = _KEY.fullmatch(unwrapped(str(key)))
        if match is None or not isinstance(value, Tensor):
            strange.append(str(key))
        else:
            halves[f"{match['layer']}.{match['half']}"] = value
    if strange or not halves:
        held = ", ".join(strange[:8]) or "nothing"
        raise WeightsError(
            f"LoRA {path} holds {held}; expected '<layer>.lora_A.weight' and '<layer>.lora_B.weight', bare or under "
            "'generator_lora'. Mend: give the LoRA file of this generator"
        )
    return halves


def fitting_lora(transformer: nn.Module, lora: Lora) -> dict[str, Tensor]:
    """What `read_lora` gives, if it fits the layers of `transformer`, which may be on the meta device.

    Raises WeightsError that lists the layers without an update, updates without a layer, and wrong shapes or ranks.
    """
    targets = lora_targets(transformer)
    found = read_lora(lora.path)
    expected = {}
    for name, layer in targets.items():
        expected[f"{name}.A"] = torch.empty(lora.rank, layer.in_features, device="meta")
        expected[f"{name}.B"] = torch.empty(layer.out_features, lora.rank, device="meta")
    wrong = misfits(found, expected)
    if wrong:
        ranks = sorted({half.shape[0] for name, half in found.items() if name.endswith(".A") and half.dim() == 2})
        listed = "\n  ".join(wrong)
        raise WeightsError(
            f"LoRA {lora.path} does not fit rank {lora.rank} on {len(targets)} layers:\n  {listed}\n"
            f"Mend: the file has rank {', '.join(map(str, ranks)) or 'unknown'}; set lora.rank and lora.alpha so, "
            "or give the LoRA of this generator"
        )
    return found


@torch.no_grad()
def apply_lora(transformer: nn.Module, lora: Lora, dtype: torch.dtype) -> None:
    """Merge a LoRA into the linear layers of `transformer`, in float32, and leave their weights in `dtype`.

    Raises WeightsError where it does not fit (see `fitting_lora`).
    """
    found = fitting_lora(transformer, lora)
    targets = lora_targets(transformer)
    # One buffer for all layers: float32 copies of their own would leave the heap a quarter larger than the weights.
    scratch = torch.empty(max(layer.weight.numel() for layer in targets.values()), dtype=torch.float32)
    for name, layer in targets.items():
        merged = scratch[: layer.weight.numel()].view_as(layer.weight).copy_(layer.weight)
        merged.addmm_(found[f"{name}.B"].float(), found[f"{name}.A"].float(), alpha=lora.alpha / lora.rank)
        layer.weight = nn.Parameter(merged.to(dtype, copy=True), requires_grad=layer.weight.requires_grad)

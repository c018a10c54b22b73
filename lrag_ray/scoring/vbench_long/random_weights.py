"""Reproducible untrained weights: the recipe of the VBench-Long conformance vectors.

A test of arithmetic needs networks that every machine builds alike, and no download. Each tensor is drawn from a
generator seeded by its own name, at scales that keep activations, flows and scores in a natural range.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lrag_ray.scoring.vbench_long.official import NetworkName
from lrag_ray.scoring.vbench_long.weights import Weights
from lrag_ray.thread_pool import thread_pool

_EMBEDDINGS = {
    "pos_embed",
    "positional_embedding",
    "position_emb",
    "scale_emb",
    "cls_token",
    "class_embedding",
    "mask_token",
    "cls",
}
"""With the scale of a matrix these would be too small for a wrong interpolation to be noticed."""

_PREFIX: Mapping[NetworkName, str] = {
    "dreamsim_clip_vitb16": "dreamsim.clip.",
    "dreamsim_open_clip_vitb16": "dreamsim.open_clip.",
}
_LORA_SCALE = 0.5


class RandomWeights:
    """Weights by the recipe, for any network."""

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        """Draw every tensor of `expected`; integer buffers are zero, as a fresh module has them."""
        # numpy lets go of the interpreter while it draws, and every tensor has a generator of its own.
        with thread_pool(os.cpu_count() or 1, "draw") as pool:
            drawn = pool.map(lambda item: _draw(name, *item), expected.items())
            tensors = dict(zip(expected, drawn, strict=True))
        return Weights(tensors, f"the recipe for {name}", _LORA_SCALE if name == "dreamsim_ensemble_lora" else 1.0)


def _draw(network: NetworkName, name: str, like: Tensor) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    # RAFT's norm3 is downsample.1 under a second name.
    seed_name = name.replace(".norm3.", ".downsample.1.") if network == "raft_things" else name
    seed = zlib.crc32((_PREFIX.get(network, "") + seed_name).encode())
    z = np.random.RandomState(seed).standard_normal(tuple(like.shape))
    last = name.rpartition(".")[2]
    if last in _EMBEDDINGS:
        z *= 0.5
    elif like.ndim > 1:
        z = z * _gain(network, name) / math.sqrt(math.prod(like.shape[1:]))
    elif last in ("running_mean", "bias") or last.endswith("_bias"):
        z *= 0.1
    elif last == "running_var":
        z = 1 + 0.1 * np.abs(z)
    else:
        z = 1 + 0.1 * z
    return _adjust(network, name, torch.from_numpy(z.astype(np.float32)))


def _gain(network: NetworkName, name: str) -> float:
    if (network, name) == ("musiq_spaq", "head.weight"):
        return 10.0
    if (network, name) == ("laion_linear", "weight"):
        return math.sqrt(768)
    return 1.0


def _adjust(network: NetworkName, name: str, tensor: Tensor) -> Tensor:
    """What the recipe changes after the draw, in float32."""
    match network:
        case "clip_vitb32" | "clip_vitl14":
            return tensor.half().float()
        case "raft_things" if name == "update_block.flow_head.conv2.weight":
            return tensor * 0.0145
        case "raft_things" if name == "update_block.flow_head.conv2.bias":
            return tensor * 0
        case "amt_s" if name.startswith(("comb_block.2.", "decoder1.convblock.2.")):
            return tensor * 0.1
        case "amt_s" if ".flow_head.2." in name:
            return tensor * 0.2
        case "musiq_spaq" if name == "head.bias":
            return tensor + 50
        case "laion_linear" if name == "bias":
            return tensor + 5
        case _:
            return tensor

"""Weights of the world that come with the package. docs/tiny-world.md is their card."""

from __future__ import annotations

from pathlib import Path

import torch

from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import WanVae, load_wan_vae
from lrag_ray.world.generator import SIZES

_FOLDER = Path(__file__).with_name("weights")

GENERATORS = {
    "tiny_world": _FOLDER / "generator.safetensors",
    "tiny_world_zero_shot": _FOLDER / "zero_shot.safetensors",
}
"""Files of the generators: the one that was trained with retrieved frames in its contexts, and the one without."""
VAE = _FOLDER / "vae"
"""Diffusers folder of the VAE."""
DIGESTS = {
    GENERATORS["tiny_world"]: "60815c9f1b34d195aaa7869275946e0b89ea0c74db21ea8ec0e5ed3a394f9c4f",
    GENERATORS["tiny_world_zero_shot"]: "7137feb44151e9668f625d56a66b501965a285c5cec17ddabebff464147b32b7",
    VAE / "diffusion_pytorch_model.safetensors": "20ef16d3a4951bfd192826781d454402efde649e4dcda364e3d28f38d1a69524",
}
"""SHA-256 of every file of weights."""


def load_generator(name: str = "tiny_world") -> CausalWanTransformer:
    """A generator of `GENERATORS`, in float32 on the CPU."""
    return load_transformer(GENERATORS[name], SIZES, dtype=torch.float32)


def load_vae() -> WanVae:
    """The VAE, in float32 on the CPU."""
    return load_wan_vae(VAE)

"""Weights of the world that come with the package."""

from __future__ import annotations

from pathlib import Path

import torch

from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.world.generator import SIZES

GENERATOR = Path(__file__).with_name("generator.safetensors")
"""Trained by `jobs.train_tiny_world` with seed 0; docs/tiny-world.md is its card."""
GENERATOR_DIGEST = "b337ab4f97230ad60967876dca1e756eb57180e7cc3978c38e68fe9dad7c9c8a"
"""SHA-256 of the file."""


def load_generator() -> CausalWanTransformer:
    """The generator that was trained with retrieved frames in its contexts."""
    return load_transformer(GENERATOR, SIZES, dtype=torch.float32)

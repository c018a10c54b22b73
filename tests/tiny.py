"""A tiny real generator and rollouts of it, for tests of the science."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Layout, host_bank
from lrag_ray.context.weights import Loaded
from lrag_ray.retrieval.history import HistoryBank
from lrag_ray.rollout.loop import RolloutLoop
from lrag_ray.rollout.loops import loop_of
from lrag_ray.rollout.noise import KeyedNoise
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.kernels import Kernels
from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.transformer import CausalWanTransformer

CONFIG = WanConfig(dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2)
LATENT = (16, 4, 6)
SAMPLER = SamplerConfig(denoising_steps=(1000, 500))


def tiny_transformer(kernels: Kernels = Kernels(), **sizes: Any) -> CausalWanTransformer:  # noqa: B008 - immutable
    model = CausalWanTransformer(replace(CONFIG, **sizes))
    fill_random(model, seed=3)
    model.kernels = kernels
    return model.eval().requires_grad_(False)


def prompt_embeds(*prompts: str) -> Tensor:
    rows = [torch.randn(CONFIG.text_len, CONFIG.text_dim, generator=keyed_generator("text", p)) for p in prompts]
    return torch.stack(rows)


def start(
    transformer: CausalWanTransformer,
    policy: type[ContextPolicy[Any]],
    settings: Any = None,
    *,
    prompts: tuple[str, ...] = ("a red fox",),
    sampler: SamplerConfig = SAMPLER,
    weights: Mapping[str, Loaded] | None = None,
    make_bank: Callable[[Layout], HistoryBank] = host_bank,
    probe: Any = None,
    seed: int = 0,
    total_blocks: int | None = None,
) -> RolloutLoop:
    settings = policy.Settings() if settings is None else settings
    noise = KeyedNoise(seed, prompts, [0] * len(prompts), (sampler.frames_per_block, *LATENT))
    return loop_of(policy)(
        transformer,
        sampler,
        policy,
        settings,
        prompt_embeds(*prompts),
        noise,
        LATENT,
        weights=weights or {},
        make_bank=make_bank,
        keys=[(seed, prompt, 0) for prompt in prompts],
        probe=probe,
        total_blocks=total_blocks,
    )


def generate(rollout: RolloutLoop, blocks: int) -> Tensor:
    """Latents [B, F, C, H, W] of the next blocks."""
    return torch.cat([result.latents for result in rollout.blocks(blocks)], dim=1)


def tiny_layout(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Layout:
    """Shapes of the rollouts that `start` makes."""
    grid = CONFIG.token_grid(*LATENT[1:])
    n = SAMPLER.frames_per_block
    return Layout(CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim, grid, n, dtype, torch.device(device))


def gathered(bank: HistoryBank, frames: Sequence[int], layers: int = CONFIG.num_layers) -> Tensor:
    """Rows of frames in all layers [n, 2, layers, f, H, head_dim]."""
    found = bank.gather(frames)
    return torch.stack([torch.cat(found.layer(layer)) for layer in range(layers)], dim=2)

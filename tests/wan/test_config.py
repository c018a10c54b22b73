"""Sizes of the generator and settings of its sampler: what follows from them and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.transformer import CausalWanTransformer


def test_tokens_and_cache_bytes_of_a_full_size_frame() -> None:
    """60x104 latents in 2x2 patches; K and V of 30 layers and 1536 channels in two bytes."""
    config = WanConfig()
    assert config.head_dim == 128
    assert config.token_grid(60, 104) == (30, 52)
    assert config.tokens_per_frame(60, 104) == 1560
    assert config.kv_bytes_per_frame(60, 104, 2) == 30 * 2 * 1560 * 1536 * 2 == 287_539_200


def test_parameters_are_counted_as_the_model_has_them() -> None:
    odd = WanConfig(dim=24, ffn_dim=20, freq_dim=8, text_dim=6, in_dim=5, out_dim=4, num_heads=2, num_layers=3)
    for config in (WanConfig(), odd):
        with torch.device("meta"):
            model = CausalWanTransformer(config)
        assert config.parameter_count() == sum(parameter.numel() for parameter in model.parameters())


def test_a_block_takes_one_pass_more_than_denoising_steps() -> None:
    assert SamplerConfig(denoising_steps=(1000, 500)).passes(4) == 12
    assert SamplerConfig(denoising_steps=(1000,), first_block_denoising_steps=(1000, 500, 250)).passes(4) == 4 + 3 * 2


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: WanConfig(dim=100, num_heads=12), "dim 100 is not a multiple of num_heads 12"),
        (lambda: WanConfig(dim=21, num_heads=3), "head_dim 7 must be even"),
        (lambda: WanConfig(patch_size=(2, 2, 2)), "one latent frame per token"),
        (lambda: WanConfig().token_grid(61, 104), "61x104 is not a multiple of the patch 2x2"),
        (lambda: WanConfig().token_grid(60, 103), "60x103 is not a multiple of the patch 2x2"),
        (lambda: SamplerConfig(denoising_steps=()), "denoising_steps is empty"),
        (lambda: SamplerConfig(denoising_steps=(1001,)), r"\[1001\] must be in 0\.\.1000"),
        (lambda: SamplerConfig(denoising_steps=(500, -1)), r"must be in 0\.\.1000"),
        (lambda: SamplerConfig(frames_per_block=0), "frames_per_block 0 must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(build: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()

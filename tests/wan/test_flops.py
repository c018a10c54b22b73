"""Counted by hand, held against what torch counts on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.rollout.noise import KeyedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.flops import (
    FLOAT32_BYTES,
    WAN_VAE_PARAMETERS,
    VaeSizes,
    _decoder,
    block_flops,
    decode_flops,
    decoder_parameter_count,
    pass_flops,
    rollout_memory,
    setup_flops,
)
from lrag_ray.wan.kernels import Kernels
from lrag_ray.wan.transformer import CausalWanTransformer
from tests.tiny import CONFIG, LATENT, prompt_embeds, tiny_transformer

FULL, SAMPLER = WanConfig(), SamplerConfig()


def test_full_size_has_the_published_numbers() -> None:
    with torch.device("meta"):
        model = CausalWanTransformer(FULL)
    assert FULL.parameter_count() == sum(p.numel() for p in model.parameters()) == 1_418_996_800
    assert FULL.kv_bytes_per_frame(60, 104, 2) == 287_539_200
    assert block_flops(FULL, SAMPLER, 60, 104, 12) / 1e12 == pytest.approx(140.6, abs=0.05)
    assert 3 * decode_flops(VaeSizes(), 60, 104) / 1e12 == pytest.approx(40.65, abs=0.005)


def test_a_block_and_the_setup_cost_what_torch_counts() -> None:
    """Given a tiny rollout, when torch counts its second block, then the closed form gives the same number."""
    sampler = SamplerConfig(denoising_steps=(1000, 500))
    noise = KeyedNoise(0, ["p"], [0], (3, *LATENT))
    # torch counts attention as matrix products, not the CPU's fused kernel.
    model = tiny_transformer(Kernels("math"))
    with FlopCounterMode(display=False) as counted_setup:
        rollout = Rollout(model, sampler, InfinityRope, InfinityRope.Settings(), prompt_embeds("p"), noise, LATENT)
    assert counted_setup.get_total_flops() == setup_flops(CONFIG, sampler)
    list(rollout.blocks(1))
    with FlopCounterMode(display=False) as counted:
        list(rollout.blocks(1))
    assert counted.get_total_flops() == block_flops(CONFIG, sampler, *LATENT[1:], 6)


def test_pass_flops_grow_with_the_attended_frames_alone_by_attention() -> None:
    tokens = FULL.tokens_per_frame(60, 104)
    growth = pass_flops(FULL, 60, 104, 3, 13) - pass_flops(FULL, 60, 104, 3, 12)
    assert growth == FULL.num_layers * 4 * 3 * tokens * tokens * FULL.dim


@pytest.mark.parametrize("base_dim", [8, 96])
def test_decoding_costs_and_remembers_what_torch_counts(base_dim: int) -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model: Any = AutoencoderKLWan(base_dim=base_dim).eval()
        cache: list[Any] = [None] * model._cached_conv_counts["decoder"]
        # The temporal doublings remember two frames from the third latent frame on.
        for first in (True, False, False):
            with FlopCounterMode(display=False) as counted, torch.no_grad():
                z = model.post_quant_conv(torch.empty(1, 16, 1, 60, 104))
                model.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=first)
    vae = VaeSizes(base_dim=base_dim)
    assert counted.get_total_flops() == decode_flops(vae, 60, 104)
    assert sum(features.numel() for features in cache if features is not None) == sum(
        c.cached_values for c in _decoder(vae, 60, 104)
    )
    parameters = dict(model.named_parameters())
    convolutions = [p for n, p in parameters.items() if n.startswith(("decoder.", "post_quant")) and "norm" not in n]
    assert decoder_parameter_count(vae) == sum(p.numel() for p in convolutions)
    if base_dim == 96:
        assert sum(p.numel() for p in parameters.values()) == WAN_VAE_PARAMETERS


def test_memory_counts_the_buffers_a_rollout_really_holds() -> None:
    """Given a rollout past its window, its KV window and exposed buffers have the sizes that the plan tells."""
    noise = KeyedNoise(0, ["p"], [0], (3, *LATENT))
    rollout = Rollout(
        tiny_transformer(), SAMPLER, InfinityRope, InfinityRope.Settings(), prompt_embeds("p"), noise, LATENT
    )
    list(rollout.blocks(5))
    memory = rollout_memory(CONFIG, *LATENT[1:], frames_per_pass=3, window_frames=12, bytes_per_value=FLOAT32_BYTES)
    policy: Any = rollout.context.policies[0]
    assert memory.window == policy.window._slots.nbytes
    buffers = [buffer for buffer in rollout.context._buffers if buffer is not None]
    assert memory.exposed == sum(buffer.k.nbytes + buffer.v.nbytes for buffer in buffers)
    assert memory.text == sum(t.nbytes for rows in rollout._text for t in rows)
    assert memory.total > memory.window + memory.exposed


def test_memory_parts_follow_batch_and_options() -> None:
    one = rollout_memory(FULL, 60, 104, frames_per_pass=3, window_frames=12)
    two = rollout_memory(FULL, 60, 104, frames_per_pass=3, window_frames=12, method_bytes=1000, batch=2, vae=VaeSizes())
    assert (two.window, two.exposed, two.text) == (2 * one.window, 2 * one.exposed, 2 * one.text)
    assert two.method == 2 * 1000
    assert (one.method, one.vae) == (0, 0)
    assert two.vae > FLOAT32_BYTES * WAN_VAE_PARAMETERS
    assert replace(one).total == one.weights + one.text + one.window + one.exposed + one.activations

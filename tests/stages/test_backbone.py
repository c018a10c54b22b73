"""What identifies a backbone in the keys of its rollouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrag_ray.config.load import load_config
from lrag_ray.errors import ConfigError
from lrag_ray.stages.backbone import latents_identity, load_generator
from lrag_ray.wan.fp8 import Fp8Linear
from lrag_ray.wan.kernels import Kernels
from tests.config.make import write

STEPS = "backbones.tiny.sampler.first_block_denoising_steps"


def test_steps_that_a_first_block_does_not_have_leave_keys_as_they_were(tmp_path: Path) -> None:
    """Given a sampler without them, its identity is that of versions that did not know them."""
    plain = latents_identity(load_config(write(tmp_path)).backbones["tiny"])["sampler"]
    assert plain == {
        "denoising_steps": [1000, 750, 500, 250],
        "warp": True,
        "shift": 5.0,
        "context_timestep": 0.0,
        "frames_per_block": 3,
    }
    own = latents_identity(load_config(write(tmp_path), [f"{STEPS}=[1000, 500]"]).backbones["tiny"])["sampler"]
    assert own == {**plain, "first_block_denoising_steps": [1000, 500]}


def test_products_are_part_of_what_a_rollout_is_and_of_its_generator(tmp_path: Path) -> None:
    """Exact ones, the default, leave keys as those of versions that knew no others."""
    plain, fp8 = (
        load_config(write(tmp_path), [f"backbones.tiny.products={kind}"]).backbones["tiny"] for kind in ("exact", "fp8")
    )
    assert latents_identity(fp8) == {**latents_identity(plain), "products": "fp8"}
    model = load_generator(fp8, torch.device("cpu"), Kernels())
    rounded = [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)]
    assert len(rounded) == 8 * 3 and not any("cross_attn.k" in name or "cross_attn.v" in name for name in rounded)
    with pytest.raises(
        ConfigError, match=r"products: is fp8, which a GPU computes for bfloat16 alone, not for float32"
    ):
        load_config(write(tmp_path), ["backbones.tiny.products=fp8", "engine.gpus_per_actor=1"])

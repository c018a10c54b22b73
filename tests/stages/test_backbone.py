"""What identifies a backbone in the keys of its rollouts."""

from __future__ import annotations

from pathlib import Path

from lrag_ray.config.load import load_config
from lrag_ray.stages.backbone import latents_identity
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

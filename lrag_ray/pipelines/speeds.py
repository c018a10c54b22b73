"""How fast GPUs generate and decode: measured from the timings of a run's commits, or bounds where nothing is measured.

A commit holds the seconds of denoising, clean-context passes and decoding; its run holds the sizes that tell how many
operations these were. Their quotient is the speed with which a plan is turned into hours. It holds for sizes like those
that were measured: a small model reaches less of a GPU than a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lrag_ray.config.methods import Method, registered_method
from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import UsageError
from lrag_ray.rollout.loops import loop_of
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import BackboneIdentity
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.run_dir import RUN_FILE
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.devices import DEVICES, without_row
from lrag_ray.wan.flops import VaeSizes, decode_flops, setup_flops

GENERATION_SHARE = (0.2, 0.6)
"""Shares of a GPU's bfloat16 peak between which unmeasured generation and decoding are planned: bounds, not a guess."""
SCORING_SHARE = (0.02, 0.1)
"""The same for VBench-Long, whose networks are small and run in float32 and TF32, whose peaks are a fifteenth to a half
of the bfloat16 one."""
VAE_SIZES = {
    "tiny": VaeSizes(base_dim=3, num_res_blocks=1),
    "tiny_world": VaeSizes(
        base_dim=8,
        num_res_blocks=1,
        dim_mult=(1, 1, 2, 4, 4),
        temporal_upsample=(False, True, True, False),
    ),
    "wan": VaeSizes(),
}


@dataclass(frozen=True)
class Speed:
    """What a device did in a run."""

    device: str
    """As the commits name it, e.g. ``NVIDIA H100 80GB HBM3, torch 2.12.1, cuDNN 91002``."""
    source: str
    """Address of the run."""
    rollouts: int
    """Behind the numbers."""
    generation_flops_per_s: float
    decoding_flops_per_s: float | None
    """None where the run decoded nothing."""


def flops_per_block(
    sizes: WanConfig, sampler: SamplerConfig, height: int, width: int, method: Method, latent_frames: int
) -> list[int]:
    """Operations of every block of a rollout of `latent_frames`."""
    policy, settings = method.policy, method.settings
    attended = partial(policy.attended_frames, settings)
    blocks = latent_frames // sampler.frames_per_block
    return loop_of(policy).block_flops(sizes, sampler, height, width, attended, blocks)


def measured_speeds(run: RolloutRun) -> list[Speed]:
    """One speed per kind of device that made rollouts of the run, most rollouts first.

    Rollouts that continued from stored parts are left out, since their timings are not of all their blocks; so are
    methods that do not come with the package. Raises StorageError where there is no run.
    """
    identity = run.require()
    sums: dict[str, list[float]] = {}
    for commits in run.inventory().commits.values():
        best = max((state.commit for state in commits.values() if state.commit), key=_frames, default=None)
        if best is None or best.timings_s.get("replay"):
            continue
        rollout = best.rollout
        if rollout.backbone not in identity.backbones or rollout.method not in identity.methods:
            continue
        stored = identity.methods[rollout.method]
        method = registered_method(stored.method, stored.settings)
        work = method and _work(identity.backbones[rollout.backbone], method, best.latent_frames)
        generating_s = best.timings_s.get("denoise", 0.0) + best.timings_s.get("context", 0.0)
        if not work or not generating_s > 0 or not math.isfinite(generating_s):
            continue
        decoding_s = best.timings_s.get("decode", 0.0)
        found = sums.setdefault(without_row(best.device_kind), [0.0] * 5)
        decoded = work.decoding if decoding_s > 0 else 0
        for i, value in enumerate((1, work.generation, generating_s, decoded, decoding_s)):
            found[i] += value
    return [
        Speed(device, run.uri, int(count), flops / seconds, decoded / decoding_s if decoded else None)
        for device, (count, flops, seconds, decoded, decoding_s) in sorted(sums.items(), key=lambda item: -item[1][0])
    ]


def _frames(commit: Any) -> int:
    return int(commit.latent_frames)


@dataclass(frozen=True)
class _Work:
    generation: int
    decoding: int


def _work(backbone: BackboneIdentity, method: Method, latent_frames: int) -> _Work | None:
    """Operations of one rollout; None where a stranger's run does not say what it takes to count them."""
    try:
        sizes = WanConfig(**_tuples(backbone.latents["transformer"]))
        sampler = SamplerConfig(**_tuples(backbone.latents["sampler"]))
        height, width = backbone.latents["latent"]["height"], backbone.latents["latent"]["width"]
        blocks = flops_per_block(sizes, sampler, height, width, method, latent_frames)
        generation = setup_flops(sizes, sampler) + sum(blocks)
        vae = VAE_SIZES.get(backbone.pixels["vae"]["kind"])
        return _Work(generation, latent_frames * decode_flops(vae, height, width) if vae else 0)
    except (KeyError, TypeError, ValueError):
        return None


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def device_named(text: str) -> str | None:
    """The name in `DEVICES` of a device as commits or people call it; None for one that is not there."""
    words = text.partition(",")[0].lower().replace("-", " ")
    names = sorted((device.name for device in DEVICES), key=len, reverse=True)
    return next((name for name in names if all(word in words.split() for word in name.lower().split())), None)


def speeds_for(config: RunConfig, run: str | None) -> list[Speed]:
    """Speeds of the run at `run`, or where that is None of the configuration's own run, if it is on this machine.

    Raises:
        StorageError: there is no run at `run`.
        UsageError: it has no timings to go by.
    """
    if run is None:
        own = Storage(config.run.uri, config.storage)
        has_run = own.is_local and (Path(own.root) / RUN_FILE).is_file()
        return measured_speeds(RolloutRun(config.run.uri, config.storage)) if has_run else []
    found = measured_speeds(RolloutRun(run, config.storage))
    if not found:
        raise UsageError(
            f"--from {run}: no rollout there was made in one go by a method of this package, so it has no timings to "
            "plan with. Fix: give a run that has, or leave --from out"
        )
    return found

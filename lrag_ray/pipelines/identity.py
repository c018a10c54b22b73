"""What a configuration and its prompts are, as `RunIdentity`: resolved settings and digests instead of paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import lrag_ray
from lrag_ray.config.horizons import latent_frames
from lrag_ray.config.methods import resolve_method
from lrag_ray.config.prompts import Prompt
from lrag_ray.config.refine import described
from lrag_ray.config.schema import MethodConfig, RunConfig
from lrag_ray.context.policy import summary_of
from lrag_ray.context.registry import registered
from lrag_ray.rollout.loops import nests
from lrag_ray.rollout.noise import NOISE_VERSION
from lrag_ray.stages.backbone import latents_identity, pixels_identity
from lrag_ray.store.identity import BackboneIdentity, Horizon, MethodIdentity, PromptIdentity, RunIdentity
from lrag_ray.store.records import now_utc
from lrag_ray.store.versions import versions
from lrag_ray.weights.digests import weights_digest


def build_identity(config: RunConfig, prompts: Sequence[Prompt]) -> RunIdentity:
    """Identity of the run that `config` describes. WeightsError for a weights file that is absent."""
    return RunIdentity(
        numerics_version=lrag_ray.NUMERICS_VERSION,
        seed=config.run.seed,
        noise=NOISE_VERSION,
        samples=config.prompts.samples,
        video=config.video.model_dump(),
        backbones={
            name: BackboneIdentity(
                latents=latents_identity(backbone),
                pixels=pixels_identity(backbone),
                label=backbone.label,
                frames_per_block=backbone.sampler.frames_per_block,
                horizons=[
                    Horizon(
                        duration_s=duration_s,
                        latent_frames=latent_frames(duration_s, backbone.sampler.frames_per_block),
                    )
                    for duration_s in config.durations_s
                ],
            )
            for name, backbone in config.backbones.items()
        },
        methods={name: _method(method, config.independent_durations) for name, method in config.methods.items()},
        prompts={
            prompt.prompt_id: PromptIdentity(
                index=prompt.index,
                text=prompt.text,
                columns=dict(prompt.columns),
                original=prompt.original,
                refined_by=described(config.prompts.refine) if prompt.original and config.prompts.refine else "",
            )
            for prompt in prompts
        },
        created_at=now_utc(),
        versions=versions(),
    )


def _method(method: MethodConfig, independent: bool) -> MethodIdentity:
    found = resolve_method(method)
    settings: dict[str, Any] = dataclasses.asdict(found.settings)
    settings |= {file.key: {"sha256": weights_digest(address)} for file, address in found.weights}
    nested = nests(found.policy) and not independent
    summary = "" if method.method in registered() else summary_of(found.policy)
    return MethodIdentity(
        method=method.method, settings=settings, nested=nested, history=method.history, summary=summary
    )

"""Backbones and methods turned into science objects, and into the digests that identify them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lrag_ray.config.methods import Method
from lrag_ray.config.schema import BackboneConfig, WeightsConfig
from lrag_ray.config.vae import VaeConfig
from lrag_ray.context.weights import Loaded, on_device
from lrag_ray.errors import ConfigError
from lrag_ray.wan import fp8
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.config import SamplerConfig
from lrag_ray.wan.kernels import Kernels
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.text import TextEncoder, load_text_encoder, tiny_text_encoder
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import WanVae, load_wan_vae, tiny_vae
from lrag_ray.weights.digests import weights_digest
from lrag_ray.weights.local import local_copy
from lrag_ray.weights.loras import local_lora, lora_identity
from lrag_ray.world.builtin import GENERATORS
from lrag_ray.world.builtin import VAE as BUILTIN_VAE

ATTENTION_BACKEND = "sdpa"
"""What `lrag_ray.wan.attention` computes; part of every rollout key. The kernel is part of the device kind
(`wan.devices.generator_kind`)."""


def latents_identity(config: BackboneConfig) -> dict[str, Any]:
    """Everything of a backbone that determines latents, weights by digest. WeightsError for a file that is absent."""
    return {
        "transformer": dataclasses.asdict(config.transformer) | {"patch_size": list(config.transformer.patch_size)},
        "weights": weights_identity(config.weights),
        "sampler": _sampler_identity(config.sampler),
        "latent": config.latent.model_dump(),
        "dtype": config.dtype,
        "attention": ATTENTION_BACKEND,
        "text_encoder": text_identity(config),
        # Left out where exact, so that keys of rollouts that were begun before there was a choice stay the same.
        **({"products": config.products} if config.products != "exact" else {}),
    }


def _sampler_identity(sampler: SamplerConfig) -> dict[str, Any]:
    """The sampler as JSON; steps that the first block does not have of its own are left out, so that keys of rollouts
    that were begun before there were any stay the same."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(sampler).items()}
    return {name: value for name, value in values.items() if value is not None}


def _file(weights: WeightsConfig) -> str | None:
    """Address of the transformer's weights; None for a random recipe."""
    return str(GENERATORS[weights.builtin]) if weights.builtin else weights.path


def weights_identity(weights: WeightsConfig) -> dict[str, Any]:
    """The transformer's weights, by digest or recipe. WeightsError for a file that is absent."""
    file = _file(weights)
    return {
        "sha256": weights_digest(file) if file else None,
        "random_seed": weights.random_seed,
        "use_ema": weights.use_ema,
        "lora": weights.lora and lora_identity(weights.lora),
    }


def text_identity(config: BackboneConfig) -> dict[str, Any]:
    """Everything that determines a prompt's text features."""
    encoder = config.text_encoder
    return {
        "kind": encoder.kind,
        "sha256": weights_digest(encoder.path) if encoder.path else None,
        "tokenizer": weights_digest(encoder.tokenizer) if encoder.tokenizer else None,
        "text_dim": config.transformer.text_dim,
        "text_len": config.transformer.text_len,
    }


def _vae_path(vae: VaeConfig) -> str | None:
    return str(BUILTIN_VAE) if vae.kind == "tiny_world" else vae.path


def pixels_identity(config: BackboneConfig) -> dict[str, Any]:
    """Everything that determines pixels, given latents."""
    vae = config.vae
    path = _vae_path(vae)
    found = {"kind": vae.kind, "sha256": weights_digest(path) if path else None, "dtype": vae.dtype}
    # Left out where it is off, so that videos that were made before there was a choice stay the same.
    return {"vae": found | {name: True for name in ("channels_last", "fused_norm") if getattr(vae, name)}}


def device_for(gpus: float) -> torch.device:
    """Where an actor with this many GPUs computes."""
    return torch.device("cuda" if gpus > 0 else "cpu")


def load_generator(config: BackboneConfig, device: torch.device, kernels: Kernels) -> CausalWanTransformer:
    """The frozen transformer, computed by `kernels`: from its checkpoint, or from the random recipe.

    ConfigError where the device does not compute `products`.
    """
    dtype = getattr(torch, config.dtype)
    weights = config.weights
    file = _file(weights)
    if file is not None:
        lora = local_lora(weights.lora) if weights.lora else None
        model = load_transformer(
            local_copy(file), config.transformer, use_ema=weights.use_ema, dtype=dtype, device=device, lora=lora
        )
    else:
        model = CausalWanTransformer(config.transformer)
        fill_random(model, weights.random_seed or 0)
        model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    model.kernels = kernels
    try:
        fp8.use(config.products, model)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return model


def load_text(config: BackboneConfig, device: torch.device) -> TextEncoder:
    """The text encoder with its tokenizer. ConfigError where a path is not given."""
    encoder, sizes = config.text_encoder, config.transformer
    if encoder.kind == "tiny":
        return tiny_text_encoder(sizes.text_dim, sizes.text_len)
    if encoder.path is None or encoder.tokenizer is None:
        raise ConfigError("text_encoder: kind umt5 needs path (the checkpoint) and tokenizer (its folder)")
    path, tokenizer = local_copy(encoder.path), local_copy(encoder.tokenizer)
    return load_text_encoder(path, tokenizer, text_len=sizes.text_len, device=device)


def load_vae(config: BackboneConfig, device: torch.device) -> WanVae:
    """The video VAE. ConfigError where its path is not given."""
    dtype = getattr(torch, config.vae.dtype)
    path = _vae_path(config.vae)
    if config.vae.kind == "tiny":
        vae = tiny_vae()
        # The module's own `to`: that of diffusers warns of parts to keep in float32 that this model does not have.
        torch.nn.Module.to(vae.model, device, dtype)
    elif path is None:
        raise ConfigError("vae: kind wan needs path (Wan2.1_VAE.pth or a Diffusers folder)")
    else:
        vae = load_wan_vae(local_copy(path), dtype=dtype, device=device)
    if config.vae.channels_last:
        vae.keep_channels_last()
    if config.vae.fused_norm:
        vae.fuse_norms()
    return vae


def load_method_weights(method: Method, device: torch.device) -> dict[str, Loaded]:
    """The weights that a method's settings use, by key. WeightsError for a file that is absent or does not fit."""
    return {
        file.key: on_device(file.read(local_copy(address)), device) for file, address in method.weights if file.used
    }

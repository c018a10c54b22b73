"""The Wan 2.1 video VAE: diffusers' AutoencoderKLWan behind the normalised latents of the generator.

Layouts: latents [F, C, H, W] as the generator makes them (zero mean, unit variance per channel), pixels [T, 3, H*8,
W*8] in [-1, 1]. F latent frames are T = 1 + 4 (F - 1) video frames.

A feature cache makes the decoder causal and exact in pieces: latent frame i is decoded with what frames 0 .. i-1 left
in the cache. The cache is an argument here, never state of the VAE, so that one VAE serves several videos at a time
(see `lrag_ray.video.decode.StreamingDecoder`).
"""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrag_ray.wan import norm_silu
from lrag_ray.wan.diffusers_folder import model_of_folder
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.soft_decoder import soften
from lrag_ray.wan.state_dict import load_strict, read_checkpoint, refuse_non_finite, state_dict_digest
from lrag_ray.wan.transfer import to_device
from lrag_ray.wan.vae_on_cpu import speed_up

FRAMES_PER_LATENT = 4
"""Video frames per latent frame; the first latent frame gives one."""


def video_frames(latent_frames: int, cold_chunk: int | None = None) -> int:
    """Video frames that `latent_frames` latent frames decode to: 1 + 4 (F - 1).

    With `cold_chunk` every chunk of this many latent frames begins like a new video (see `StreamingDecoder`).
    """
    beginnings = -(-latent_frames // cold_chunk) if cold_chunk else 1
    return FRAMES_PER_LATENT * (latent_frames - beginnings) + beginnings


class DecoderCache:
    """What the decoder remembers of the frames before: at most two feature frames per causal convolution."""

    def __init__(self, convolutions: int) -> None:
        self.features: list[Any] = [None] * convolutions
        self.empty = True


class WanVae:
    """A loaded VAE, frozen. `model` is the AutoencoderKLWan; move it with ``vae.model.to(device)``."""

    def __init__(self, model: Any) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        speed_up(model.decoder)
        config: Any = model.config
        self.latent_channels: int = config.z_dim
        dtype, device = model.dtype, model.device
        std = torch.tensor(config.latents_std, dtype=dtype, device=device)
        # Buffers, so that they move with the model. The public code keeps the reciprocal and divides by it; z * std
        # rounds differently (golden/vae/README.md).
        mean = torch.tensor(config.latents_mean, dtype=dtype, device=device)
        model.register_buffer("latent_shift", mean.view(-1, 1, 1), persistent=False)
        model.register_buffer("latent_reciprocal_scale", (1.0 / std).view(-1, 1, 1), persistent=False)

    def keep_channels_last(self) -> None:
        """Lay out the convolutions, and so all that follows from them, with the channels of a pixel side by side."""
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.contiguous(memory_format=torch.channels_last)
            elif isinstance(module, nn.Conv3d):
                module.weight.data = module.weight.contiguous(memory_format=torch.channels_last_3d)

    def fuse_norms(self) -> None:
        """Compute the decoder's norms and activations in one kernel, where a device takes it (`wan.norm_silu`)."""
        norm_silu.use(self.model.decoder)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and values of the weights."""
        return state_dict_digest(self.model.state_dict())

    def new_cache(self) -> DecoderCache:
        """An empty cache: the next frame decoded with it begins a video."""
        return DecoderCache(self.model._cached_conv_counts["decoder"])

    @torch.no_grad()
    def decode_frame(self, latent: Tensor, cache: DecoderCache) -> Tensor:
        """Decode the next latent frame [C, H, W] of a video to pixels [1 or 4, 3, H*8, W*8] in [-1, 1]."""
        model = self.model
        shift = model.latent_shift
        z = to_device(latent, shift.device, shift.dtype) / model.latent_reciprocal_scale + shift
        pixels: Tensor = model.decoder(
            model.post_quant_conv(z[None, :, None]), feat_cache=cache.features, feat_idx=[0], first_chunk=cache.empty
        )
        cache.empty = False
        return pixels[0].clamp(-1, 1).transpose(0, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode a whole video: latents [F, C, H, W] to pixels [1 + 4 (F - 1), 3, H*8, W*8] in [-1, 1]."""
        cache = self.new_cache()
        return torch.cat([self.decode_frame(latent, cache) for latent in latents])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [1 + 4 (F - 1), 3, H, W] in [-1, 1] to latents [F, C, H/8, W/8], the posterior's mean.

        Raises:
            ValueError: the number of frames is not 1 + 4 n (the VAE would silently drop the rest).
        """
        frames = pixels.shape[0]
        if (frames - 1) % FRAMES_PER_LATENT:
            raise ValueError(f"{frames} frames cannot be encoded: the VAE takes 1 + 4 n of them")
        model = self.model
        mean = model.encode(pixels.to(model.latent_shift).transpose(0, 1)[None]).latent_dist.mode()
        normalised: Tensor = (mean[0].transpose(0, 1) - model.latent_shift) * model.latent_reciprocal_scale
        return normalised


def tiny_vae(seed: int = 13) -> WanVae:
    """The VAE of the tiny backbone: the real architecture at base width 3 with random, softened weights.

    Latents have 16 channels and 8 x 8 x 4 compression as at full size.
    """
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(base_dim=3, num_res_blocks=1)
    fill_random(model, seed)
    soften(model.decoder)
    return WanVae(model)


def load_wan_vae(
    path: str | Path,
    *,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> WanVae:
    """Load ``Wan2.1_VAE.pth`` (original key names; .safetensors too) or a Diffusers folder (config.json and weights).

    `config` holds arguments of AutoencoderKLWan for a file of other than the released sizes; a folder brings its own.
    float32 is the default: in bfloat16 the decoder is visibly off (golden/vae/tiny_vae.json).

    Raises:
        WeightsError: missing, damaged or misfitting files, values that are not finite.
    """
    # The module's own `to`: that of diffusers warns of parts to keep in float32 that this model does not have.
    model = nn.Module.to(mapped_vae(path, config), device=device, dtype=dtype)
    refuse_non_finite(model.state_dict(), f"VAE {path}")
    return WanVae(model)


def mapped_vae(path: str | Path, config: dict[str, Any] | None = None) -> Any:
    """The AutoencoderKLWan whose tensors are mapped to the file as they are stored; none is read.

    Raises WeightsError with everything that does not fit, so it is also the check of a file.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    path = Path(path)
    if path.is_dir():
        # from_pretrained only warns about missing tensors; our own strict fill does not.
        model = model_of_folder(path, "VAE", _vae_settings(), AutoencoderKLWan.from_config)
        state = read_checkpoint(path / "diffusion_pytorch_model.safetensors")
    else:
        state = convert_wan_vae_to_diffusers(read_checkpoint(path))
        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(config or {})
    load_strict(model, state, f"VAE {path}", "give Wan2.1_VAE.pth or the `vae` folder of the Diffusers repository")
    return model


def _vae_settings() -> set[str]:
    """What a config.json may set: the arguments of the class, and which of them it left at their defaults."""
    from diffusers import AutoencoderKLWan

    return {*inspect.signature(AutoencoderKLWan.__init__).parameters, "_use_default_values"} - {"self"}

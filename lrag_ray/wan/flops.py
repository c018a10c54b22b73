"""Arithmetic and GPU memory of a rollout, from sizes alone: what `plan` shows before anything runs.

A multiply-add counts as two floating-point operations. Norms, activations, RoPE and other pointwise work are left out
of the operations (below 1 %).

At full size a block of 3 latent frames over a window of 12 takes 4 passes of 28.3 TFLOP and a
clean-context pass of 27.4, and 40.65 TFLOP to decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import NamedTuple

from lrag_ray.wan.config import SamplerConfig, WanConfig

FLOAT32_BYTES = 4


def pass_flops(config: WanConfig, height: int, width: int, frames: int, attended_frames: int) -> int:
    """Operations of one denoising pass over `frames` latent frames of `height` x `width`.

    `attended_frames` are the latent frames of self-attention, the current ones included.
    """
    rows = frames * config.tokens_per_frame(height, width)
    layers = config.num_layers * _layer_flops(config, height, width, frames, attended_frames)
    return layers + 2 * rows * config.dim * prod(config.patch_size) * (config.in_dim + config.out_dim)


def clean_pass_flops(config: WanConfig, height: int, width: int, frames: int, attended_frames: int) -> int:
    """Operations of a clean-context pass: of the last layer it computes keys and values alone, and no flow."""
    rows = frames * config.tokens_per_frame(height, width)
    layers = (config.num_layers - 1) * _layer_flops(config, height, width, frames, attended_frames)
    return layers + 4 * rows * config.dim**2 + 2 * rows * config.dim * prod(config.patch_size) * config.in_dim


def _layer_flops(config: WanConfig, height: int, width: int, frames: int, attended_frames: int) -> int:
    tokens, d = config.tokens_per_frame(height, width), config.dim
    queries, keys = frames * tokens, attended_frames * tokens
    # Self-attention projects q, k, v and o; cross-attention q and o, since its k and v are made once per rollout.
    linear = 2 * queries * (6 * d * d + 2 * d * config.ffn_dim)
    return linear + 4 * queries * d * (keys + config.text_len)


def block_flops(
    config: WanConfig, sampler: SamplerConfig, height: int, width: int, attended_frames: int, block: int = 1
) -> int:
    """Operations of all passes of one block (140.6 TFLOP at full size and 12 attended frames).

    `block` matters where the first one, 0, has denoising steps of its own.
    """
    at = (height, width, sampler.frames_per_block, attended_frames)
    return len(sampler.steps_of(block)) * pass_flops(config, *at) + clean_pass_flops(config, *at)


def setup_flops(config: WanConfig, sampler: SamplerConfig) -> int:
    """Operations once per rollout: text embedding, cross-attention keys and values, and time embeddings."""
    d = config.dim
    text = 2 * config.text_len * (config.text_dim * d + d * d + config.num_layers * 2 * d * d)
    timesteps = len(sampler.denoising_steps) + len(sampler.first_block_denoising_steps or ()) + 1
    return text + timesteps * 2 * sampler.frames_per_block * d * (config.freq_dim + d + 6 * d)


@dataclass(frozen=True)
class VaeSizes:
    """Sizes of the video VAE's decoder; the defaults are Wan 2.1."""

    base_dim: int = 96
    """Channels at full resolution."""
    latent_channels: int = 16
    """Channels of a latent frame."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels per level as multiples of `base_dim`, at full resolution first."""
    temporal_upsample: tuple[bool, ...] = (True, True, False)
    """Which of the decoder's doublings of the resolution double the frames as well."""

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent row or column."""
        return int(2 ** len(self.temporal_upsample))


class _Convolution(NamedTuple):
    """A convolution of the decoder with what it reads for one latent frame that is not the first."""

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    """Extent in time and number of taps in space."""
    frames: int
    area: int
    """Pixels of its output frame."""

    @property
    def flops(self) -> int:
        return 2 * self.inputs * self.outputs * prod(self.kernel) * self.frames * self.area

    @property
    def cached_values(self) -> int:
        """Values of the two input frames that a causal convolution remembers."""
        return 2 * self.inputs * self.area if self.kernel[0] > 1 else 0

    @property
    def peak_values(self) -> int:
        """Residual, joined input with its padded copy, and output."""
        padded = self.inputs * (self.frames + self.kernel[0] - 1) * self.area
        return self.inputs * self.frames * self.area + 2 * padded + self.outputs * self.frames * self.area


def _decoder(vae: VaeSizes, height: int, width: int) -> Iterator[_Convolution]:
    """Convolutions of the decoder in order."""
    widths = [vae.base_dim * factor for factor in (vae.dim_mult[-1], *reversed(vae.dim_mult))]
    frames, area, top = 1, height * width, widths[0]
    yield _Convolution(vae.latent_channels, vae.latent_channels, (1, 1), frames, area)
    yield _Convolution(vae.latent_channels, top, (3, 9), frames, area)
    yield from _residual(top, top, frames, area)
    yield _Convolution(top, 3 * top, (1, 1), frames, area)
    yield _Convolution(top, top, (1, 1), frames, area)
    yield from _residual(top, top, frames, area)
    for level, (before, after) in enumerate(pairwise(widths)):
        # The convolution behind each doubling halves the channels.
        inputs = before // 2 if level else before
        for _ in range(vae.num_res_blocks + 1):
            yield from _residual(inputs, after, frames, area)
            inputs = after
        if level < len(vae.temporal_upsample):
            if vae.temporal_upsample[level]:
                yield _Convolution(after, 2 * after, (3, 1), frames, area)
                frames *= 2
            area *= 4
            yield _Convolution(after, after // 2, (1, 9), frames, area)
    yield _Convolution(widths[-1], 3, (3, 9), frames, area)


def _residual(inputs: int, outputs: int, frames: int, area: int) -> Iterator[_Convolution]:
    if inputs != outputs:
        yield _Convolution(inputs, outputs, (1, 1), frames, area)
    yield _Convolution(inputs, outputs, (3, 9), frames, area)
    yield _Convolution(outputs, outputs, (3, 9), frames, area)


def decode_flops(vae: VaeSizes, height: int, width: int) -> int:
    """Operations to decode one latent frame that is not the first (13.55 TFLOP at full size)."""
    attention = 4 * (height * width) ** 2 * vae.base_dim * vae.dim_mult[-1]
    return attention + sum(convolution.flops for convolution in _decoder(vae, height, width))


def decoder_parameter_count(vae: VaeSizes) -> int:
    """Parameters of the decoder's convolutions (its norms and the encoder are not counted)."""
    return sum(c.outputs * (c.inputs * prod(c.kernel) + 1) for c in _decoder(vae, 1, 1))


def decode_bytes(
    vae: VaeSizes, height: int, width: int, bytes_per_value: int = FLOAT32_BYTES, *, videos: int = 1
) -> int:
    """GPU memory of streaming decodes beside the weights: a feature cache for each of the `videos` that are open, and
    the largest layer's activations."""
    convolutions = list(_decoder(vae, height, width))
    cached = sum(convolution.cached_values for convolution in convolutions)
    return bytes_per_value * (videos * cached + max(convolution.peak_values for convolution in convolutions))


@dataclass(frozen=True)
class RolloutMemory:
    """GPU memory of one rollout actor in bytes, by what it is for."""

    weights: int
    """The transformer."""
    text: int
    """Cross-attention keys and values of the prompts."""
    window: int
    """The KV cache: unrotated keys and values of the cached latent frames."""
    exposed: int
    """The attention buffers: rotated keys and values of context and current block, in every layer."""
    activations: int
    """The largest layer's intermediate results, its float32 copies included."""
    method: int
    """What the context method holds beside the window (see `context.policy`, device_bytes)."""
    vae: int
    """Weights, feature cache and activations of the decoder."""
    total: int = field(init=False)
    """Sum of the parts, without the CUDA context (about 0.5 GB) and fragmentation."""

    def __post_init__(self) -> None:
        parts = (self.weights, self.text, self.window, self.exposed, self.activations, self.method, self.vae)
        object.__setattr__(self, "total", sum(parts))


WAN_VAE_PARAMETERS = 126_892_531
"""Encoder and decoder of Wan 2.1; both are loaded, in float32."""


def rollout_memory(
    config: WanConfig,
    height: int,
    width: int,
    *,
    frames_per_pass: int,
    window_frames: int,
    method_bytes: int = 0,
    batch: int = 1,
    bytes_per_value: int = 2,
    vae: VaeSizes | None = None,
) -> RolloutMemory:
    """GPU memory of an actor that runs `batch` rollouts in lockstep.

    `frames_per_pass` are the latent frames of the largest pass; `window_frames` those of the KV cache, current ones
    included; `method_bytes` what the context method of one rollout holds beside them; `vae` where the actor decodes.
    """
    frame = config.kv_bytes_per_frame(height, width, bytes_per_value)
    tokens = batch * frames_per_pass * config.tokens_per_frame(height, width)
    # The widest moment: the feed-forward's hidden rows before and after the activation, or q, k, v with the float32
    # pairs of their rotation; beside the residual stream and its modulated copy.
    widest = max(2 * config.ffn_dim * bytes_per_value, config.dim * (3 * bytes_per_value + 4 * FLOAT32_BYTES))
    stored_vae = FLOAT32_BYTES * WAN_VAE_PARAMETERS if vae == VaeSizes() else 0
    if vae is not None and not stored_vae:
        stored_vae = FLOAT32_BYTES * decoder_parameter_count(vae)
    return RolloutMemory(
        weights=config.parameter_count() * bytes_per_value,
        text=batch * config.num_layers * 2 * config.text_len * config.dim * bytes_per_value,
        window=batch * window_frames * frame,
        exposed=batch * window_frames * frame,
        activations=tokens * (widest + 3 * config.dim * bytes_per_value),
        method=batch * method_bytes,
        vae=stored_vae + decode_bytes(vae, height, width, videos=batch) if vae is not None else 0,
    )

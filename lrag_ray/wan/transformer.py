"""The causal Wan2.1 text-to-video transformer, with the original names in its state dict.

It denoises the latent frames of one block. What those frames attend to besides themselves is not its business: each
layer hands its unrotated q, k and v to an `AttentionContext` and gets the attention output back.

Legend: B batch, F latent frames of the block, C latent channels, T tokens per latent frame, L = F·T tokens ordered
frame, row, column, D model width, H heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrag_ray.wan import residual_norm
from lrag_ray.wan.attention import attention
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.kernels import Kernels


class Projected(NamedTuple):
    """Projections of a block's rows in one layer, each [B, L, D], and the norms that follow for queries and keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: RMSNorm
    norm_k: RMSNorm
    heads: int

    def queries(self) -> Tensor:
        """Normed queries [B, L, H, head_dim]."""
        return cast(Tensor, self.norm_q(self.q)).unflatten(-1, (self.heads, -1))

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Normed keys and values, each [B, L, H, head_dim]."""
        k = cast(Tensor, self.norm_k(self.k))
        return k.unflatten(-1, (self.heads, -1)), self.v.unflatten(-1, (self.heads, -1))


class AttentionContext(Protocol):
    """Self-attention of one pass over the rows that a context method exposes."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output for the block's unrotated q, k and v, each [B, L, H, head_dim]."""

    @property
    def fuses(self) -> bool:
        """Whether it takes projections, by `attend_projected`, in place of `attend`."""

    def attend_projected(self, layer: int, projected: Projected) -> Tensor:
        """`attend` for rows whose norms are still to be done."""

    @property
    def observes_queries(self) -> bool:
        """Whether `keep` needs the queries."""

    def keep(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """Take the rows of a layer whose attention output nobody reads; q as `observes_queries` says."""


class TextContext(NamedTuple):
    """Cross-attention keys and values of every layer, each [B, text_len, H, head_dim]; fixed for a rollout."""

    k: list[Tensor]
    v: list[Tensor]


class Modulation(NamedTuple):
    """What the time embedding makes of a layer, each [B, F, 1, D]; `scale` is 1 + the learned scale."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class TimeContext(NamedTuple):
    """Timesteps [B, F] of a pass, and what they modulate; fixed for a rollout, like the text."""

    timesteps: Tensor
    layers: list[Modulation]
    head: tuple[Tensor, Tensor]
    """Shift and 1 + scale of the head, each [B, F, 1, D]."""


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, back to the input's dtype before the scale: one kernel and the scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).mul_(self.weight)


class Attention(nn.Module):
    """Projections and query/key norms, shared by self- and cross-attention."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def projected(self, x: Tensor) -> Projected:
        """Queries, keys and values of x [B, rows, D] before their norms."""
        return Projected(self.q(x), self.k(x), self.v(x), self.norm_q, self.norm_k, self.heads[0])

    def queries(self, x: Tensor) -> Tensor:
        """Normed queries [B, rows, H, head_dim] of x [B, rows, D]."""
        return cast(Tensor, self.norm_q(self.q(x))).unflatten(-1, self.heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normed keys and values, each [B, rows, H, head_dim]."""
        k, v = cast(Tensor, self.norm_k(self.k(x))), cast(Tensor, self.v(x))
        return k.unflatten(-1, self.heads), v.unflatten(-1, self.heads)


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated by the time embedding."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def modulated_by(self, time: Tensor) -> Modulation:
        """The layer's modulation of the time projection [B, F, 6, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[:, None] + time).chunk(6, dim=2)
        return Modulation(shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2)

    def forward(
        self,
        x: Tensor,
        time: Modulation,
        text_k: Tensor,
        text_v: Tensor,
        context: AttentionContext,
        layer: int,
        kernels: Kernels,
    ) -> Tensor:
        """One layer over x [B, L, D], which it overwrites."""
        fuses = residual_norm.fuses(kernels, x.device)
        step = residual_norm.fused if fuses else residual_norm.plain
        h = step(x, norm=self.norm1, shift=time.shift1, scale=time.scale1)
        if context.fuses:
            y = context.attend_projected(layer, self.self_attn.projected(h))
        else:
            k, v = self.self_attn.keys_values(h)
            y = context.attend(layer, self.self_attn.queries(h), k, v)
        h = step(x, self.self_attn.o(y.flatten(2)), time.gate1, self.norm3)
        y = attention(self.cross_attn.queries(h), text_k, text_v, kernels.attention)
        h = step(x, self.cross_attn.o(y.flatten(2)), None, self.norm2, time.shift2, time.scale2)
        return step(x, residual_norm.feed_forward(h, self.ffn, fuses=fuses), time.gate2)

    def keep(self, x: Tensor, time: Modulation, context: AttentionContext, layer: int, kernels: Kernels) -> None:
        """Hand the rows of x [B, L, D] to the context, and compute nothing that follows from attention."""
        step = residual_norm.fused if residual_norm.fuses(kernels, x.device) else residual_norm.plain
        h = step(x, norm=self.norm1, shift=time.shift1, scale=time.scale1)
        k, v = self.self_attn.keys_values(h)
        context.keep(layer, self.self_attn.queries(h) if context.observes_queries else None, k, v)


class Head(nn.Module):
    """Final norm, modulation and projection to patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def modulated_by(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and 1 + scale of the time embedding [B, F, 1, D]."""
        shift, scale = (self.modulation[:, None] + time).chunk(2, dim=2)
        return shift, 1 + scale

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Patch values [B, L, patch · C] from x [B, L, D] and `modulated_by`."""
        return self.head(residual_norm.plain(x, norm=self.norm, shift=shift, scale=scale))


class CausalWanTransformer(nn.Module):
    """The frozen generator: noisy latents of a block, timesteps and text in, flow out."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels = Kernels()
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def embed_text(self, prompt_embeds: Tensor) -> TextContext:
        """Cross-attention rows of text features [B, text_len, text_dim].

        Rows after the prompt are zero; they pass through the text MLP and are attended, as in the released models.
        Raises ValueError for features of another shape.
        """
        expected = (self.config.text_len, self.config.text_dim)
        if tuple(prompt_embeds.shape[1:]) != expected:
            raise ValueError(f"prompt_embeds {list(prompt_embeds.shape)}: expected [B, {expected[0]}, {expected[1]}]")
        text = self.text_embedding(prompt_embeds)
        rows = [cast(WanBlock, block).cross_attn.keys_values(text) for block in self.blocks]
        return TextContext([k for k, _ in rows], [v for _, v in rows])

    def embed_time(self, timesteps: Tensor) -> TimeContext:
        """All modulation of a pass at timesteps [B, F]."""
        sinusoid = sinusoidal_embedding(self.config.freq_dim, timesteps.flatten())
        time = self.time_embedding(sinusoid.to(self.patch_embedding.weight.dtype))
        projected = self.time_projection(time).view(*timesteps.shape, 6, -1)
        layers = [cast(WanBlock, block).modulated_by(projected) for block in self.blocks]
        return TimeContext(timesteps, layers, self.head.modulated_by(time.view(*timesteps.shape, 1, -1)))

    def forward(
        self, latents: Tensor, time: TimeContext | Tensor, text: TextContext, context: AttentionContext
    ) -> Tensor:
        """Flow [B, F, C, H, W] of noisy latents [B, F, C, H, W] at timesteps [B, F] or what `embed_time` made of them.

        For inference: activations are overwritten.
        """
        if isinstance(time, Tensor):
            time = self.embed_time(time)
        batch, frames = latents.shape[:2]
        _, ph, pw = self.config.patch_size
        rows, columns = self.config.token_grid(*latents.shape[-2:])
        x = self._patches(latents)
        for layer, block in enumerate(self.blocks):
            x = block(x, time.layers[layer], text.k[layer], text.v[layer], context, layer, self.kernels)
        x = self.head(x, *time.head)
        x = x.view(batch, frames, rows, columns, ph, pw, self.config.out_dim)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, self.config.out_dim, rows * ph, columns * pw)

    def keep(self, latents: Tensor, time: TimeContext, text: TextContext, context: AttentionContext) -> None:
        """The clean-context pass over latents [B, F, C, H, W], which is run for the keys and values of each layer.

        It ends with those of the last layer. The context is handed the same bits as by `forward`.
        """
        x = self._patches(latents)
        *before, last = cast(list[WanBlock], list(self.blocks))
        for layer, block in enumerate(before):
            x = block(x, time.layers[layer], text.k[layer], text.v[layer], context, layer, self.kernels)
        last.keep(x, time.layers[-1], context, len(before), self.kernels)

    def _patches(self, latents: Tensor) -> Tensor:
        """Tokens [B, L, D] of latents [B, F, C, H, W]."""
        _, ph, pw = self.config.patch_size
        # A patch is one frame deep: the 3-D convolution is a 2-D one per frame.
        x = F.conv2d(latents.flatten(0, 1), self.patch_embedding.weight[:, :, 0], self.patch_embedding.bias, (ph, pw))
        return x.flatten(2).transpose(1, 2).reshape(len(latents), -1, self.config.dim).contiguous()


def sinusoidal_embedding(dim: int, t: Tensor) -> Tensor:
    """Cosines then sines [m, dim] of timesteps t [m], in float64: t · 10000^(-i / (dim/2))."""
    half = dim // 2
    frequency = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)

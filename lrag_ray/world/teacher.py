"""Teacher forcing: all learned blocks of a batch of sequences in one pass, each in the context of its rollout.

The frozen generator's forward pass overwrites activations and sees one block at a time; this one is for training, over
the same modules. Clean frames are passed at the context timestep, as the clean-context pass does, and learned blocks
attend to the K and V that come of it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.wan.rope import Rope
from lrag_ray.wan.transformer import Attention, CausalWanTransformer, WanBlock
from lrag_ray.world.contexts import BLOCK, Contexts


def teacher_forced(
    transformer: CausalWanTransformer, latents: Tensor, timesteps: Tensor, text: Tensor, contexts: Contexts
) -> Tensor:
    """Flow [B, n, C, H, W] of the learned blocks' n frames.

    `latents` [B, S, C, H, W] and `timesteps` [B, S] of the clean frames, then of the learned ones; `text`
    [B, text_len, text_dim]; S = 3 G frames for `contexts` of G blocks, the last n / 3 of them learned.
    """
    batch, slots, channels, height, width = latents.shape
    config = transformer.config
    grid = config.token_grid(height, width)
    tokens = grid[0] * grid[1]
    learned = slots - contexts.learned_from * BLOCK
    rows = transformer.embed_text(text)
    time = transformer.embed_time(timesteps)
    attend = _Attend(Rope(config.head_dim, grid, latents.device), contexts, slots)
    x = transformer._patches(latents)
    for layer, block in enumerate(cast(list[WanBlock], list(transformer.blocks))):
        m = time.layers[layer]
        h = _modulated(block.norm1(x), m.shift1, m.scale1)
        k, v = block.self_attn.keys_values(h)
        if layer == config.num_layers - 1:
            # Nobody reads what the last layer makes of clean frames.
            x, h = x[:, -learned * tokens :], h[:, -learned * tokens :]
            m = type(m)(*(part[:, -learned:] for part in m))
        q = block.self_attn.queries(h)
        x = x + _gated(block.self_attn.o(attend(q, k, v).flatten(2)), m.gate1)
        x = x + block.cross_attn.o(_cross(block.cross_attn, block.norm3(x), rows.k[layer], rows.v[layer]))
        x = x + _gated(block.ffn(_modulated(block.norm2(x), m.shift2, m.scale2)), m.gate2)
    shift, scale = (part[:, -learned:] for part in time.head)
    out: Tensor = transformer.head.head(_modulated(transformer.head.norm(x), shift, scale))
    _, ph, pw = config.patch_size
    out = out.view(batch, learned, *grid, ph, pw, channels)
    return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, learned, channels, height, width)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    rows: Tensor = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift, rows, scale).flatten(1, 2)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    rows: Tensor = x.unflatten(1, (gate.shape[1], -1))
    return (rows * gate).flatten(1, 2)


def _cross(module: Attention, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = module.queries(x)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).flatten(2)


class _Attend:
    """Attention of the last blocks of a batch over their contexts; angles and places are the same in all layers."""

    def __init__(self, rope: Rope, contexts: Contexts, slots: int) -> None:
        batch, groups, window = contexts.slots.shape
        tokens = rope.tokens_per_frame
        token = torch.arange(tokens).expand(batch, groups, window, tokens)
        angles = rope.tokens(contexts.indices[..., None].expand_as(token).flatten(), token.flatten())
        self._turns = angles.turns.view(batch * groups, window * tokens, 1, -1)
        self._frames = (contexts.slots + slots * torch.arange(batch)[:, None, None]).flatten()
        absent = contexts.absent[..., None].expand_as(token).reshape(batch, groups, 1, 1, window * tokens)
        self._bias = torch.zeros(absent.shape).masked_fill(absent, -torch.inf)
        self._groups, self._tokens = groups, tokens

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, H, head_dim] for queries of the last L / (3 f) blocks and K and V of all."""
        batch, length, heads, width = q.shape
        own = BLOCK * self._tokens
        groups = length // own
        q = q.reshape(batch * groups, own, heads, width)
        if groups < self._groups:
            kept = self._last(torch.arange(batch * self._groups), batch, groups)
            turns = self._turns[kept]
            frames = self._last(self._frames, batch, groups)
            bias = self._bias[:, -groups:]
        else:
            turns, frames, bias = self._turns, self._frames, self._bias
        k, v = (self._gathered(each, frames, batch * groups) for each in (k, v))
        q, k = _rotated(q, turns[:, -own:]), _rotated(k, turns)
        bias = bias.flatten(0, 1).expand(-1, 1, own, -1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return y.transpose(1, 2).reshape(batch, length, heads, width)

    def _last(self, per_group: Tensor, batch: int, groups: int) -> Tensor:
        return per_group.view(batch, self._groups, -1)[:, -groups:].flatten()

    def _gathered(self, rows: Tensor, frames: Tensor, groups: int) -> Tensor:
        """Rows [B, S·f, H, head_dim] of each group's frames, [groups, W·f, H, head_dim]."""
        by_frame = rows.reshape(-1, self._tokens * rows.shape[2] * rows.shape[3])
        return by_frame.index_select(0, frames).view(groups, -1, rows.shape[2], rows.shape[3])


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

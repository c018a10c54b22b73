"""Rotary position embedding over (frame, row, column), as pure functions of tensors.

Each head is a list of channel pairs. With c = head_dim / 2 pairs, the first c - 2·(c//3) turn with the temporal
index, the next c//3 with the token row and the last c//3 with the token column; pair i of a group of width w turns by
index · 10000^(-i / w). The temporal index is free: a context method chooses it per frame or per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrag_ray.wan.transfer import to_device

MAX_INDEX = 1024
"""Rows of the released table: temporal indices run from 0 to 1023."""


class Angles(NamedTuple):
    """Cosines and sines of the turning angles of some rows, float32 [..., rows, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def rows(self, start: int, end: int) -> Angles:
        """The angles of rows start .. end-1."""
        return Angles(self.cos[..., start:end, :, :], self.sin[..., start:end, :, :])


class Rope:
    """Angles for the tokens of latent frames with a grid of (rows, columns) tokens."""

    def __init__(self, head_dim: int, grid: tuple[int, int], device: torch.device) -> None:
        pairs = head_dim // 2
        spatial = pairs // 3
        rows, columns = grid
        temporal = _table(MAX_INDEX, pairs - 2 * spatial)
        by_row = _table(rows, spatial)[:, None].expand(rows, columns, spatial)
        by_column = _table(columns, spatial)[None].expand(rows, columns, spatial)
        space = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        self._temporal = Angles(temporal.cos().float().to(device), temporal.sin().float().to(device))
        self._spatial = Angles(space.cos().float().to(device), space.sin().float().to(device))
        self.tokens_per_frame = rows * columns

    def frames(self, temporal_indices: Sequence[int]) -> Angles:
        """Angles of whole frames, one temporal index each: [frames · tokens_per_frame, 1, head_dim / 2]."""
        index = torch.tensor(temporal_indices, dtype=torch.long).repeat_interleave(self.tokens_per_frame)
        token = torch.arange(self.tokens_per_frame).repeat(len(temporal_indices))
        return self.tokens(index, token)

    def tokens(self, temporal_index: Tensor, token: Tensor) -> Angles:
        """Angles of single tokens: temporal index [rows] and position in the frame [rows], both on the CPU.

        Negative indices turn the other way. Raises IndexError for an index outside the released table.
        """
        outside = temporal_index[temporal_index.abs() >= MAX_INDEX]
        if len(outside):
            raise IndexError(
                f"temporal RoPE index {int(outside[0])} lies outside the released table 0..{MAX_INDEX - 1}"
            )
        device = self._temporal.sin.device
        sign = to_device(temporal_index.sign()[:, None], device, self._temporal.sin.dtype)
        temporal_index, token = to_device(temporal_index.abs(), device), to_device(token, device)
        cos = torch.cat([self._temporal.cos[temporal_index], self._spatial.cos[token]], dim=-1)
        sin = torch.cat([self._temporal.sin[temporal_index] * sign, self._spatial.sin[token]], dim=-1)
        return Angles(cos[:, None], sin[:, None])


def _table(indices: int, pairs: int) -> Tensor:
    """Angles [indices, pairs] in float64: index · 10000^(-pair / pairs)."""
    frequency = torch.pow(10000.0, -torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    return torch.arange(indices, dtype=torch.float64)[:, None] * frequency


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the channel pairs of x [..., rows, heads, head_dim] by `angles`, in float32, back to x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * angles.cos - odd * angles.sin, even * angles.sin + odd * angles.cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)

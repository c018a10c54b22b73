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
"""Rows of the generators' released temporal table: indices run from 0 to 1023."""
_KEPT = 2
"""Results of `Rope.frames` that are kept: those of a block's own frames and of its context."""


_VECTOR = 16
"""Complex numbers that torch computes at once with AVX-512: two registers of 8."""
_THREAD_GRAIN = 32768
"""Values below which torch does not split a pointwise operation among threads."""


class Angles(NamedTuple):
    """Turning angles of some rows as points of the unit circle, complex64 [..., rows, 1, head_dim / 2]."""

    turns: Tensor

    def rows(self, start: int, end: int) -> Angles:
        """The angles of rows start .. end-1."""
        return Angles(self.turns[..., start:end, :, :])

    def of(self, batch: slice) -> Angles:
        """The angles of some batch elements, where elements [B, rows, 1, head_dim / 2] have their own."""
        return Angles(self.turns[batch]) if self.turns.dim() == 4 else self


class Rope:
    """Angles for the tokens of latent frames with a grid of (rows, columns) tokens."""

    def __init__(
        self, head_dim: int, grid: tuple[int, int], device: torch.device, temporal_indices: int = MAX_INDEX
    ) -> None:
        """`temporal_indices` are the rows of the temporal table; a longer one begins with the same values."""
        pairs = head_dim // 2
        spatial = pairs // 3
        rows, columns = grid
        by_row = _table(rows, spatial)[:, None].expand(rows, columns, spatial)
        by_column = _table(columns, spatial)[None].expand(rows, columns, spatial)
        space = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        self._temporal = _turns(_table(temporal_indices, pairs - 2 * spatial)).to(device)
        self._spatial = _turns(space).to(device)
        self._last: dict[tuple[int, ...], Angles] = {}
        self.tokens_per_frame = rows * columns

    def frames(self, temporal_indices: Sequence[int]) -> Angles:
        """Angles of whole frames, one temporal index each: [frames · tokens_per_frame, 1, head_dim / 2].

        The newest results are kept: with indices relative to a window, every block asks for the same. Raises
        IndexError for an index outside the table.
        """
        key = tuple(temporal_indices)
        angles = self._last.pop(key, None)
        if angles is None:
            if len(self._last) == _KEPT:
                del self._last[next(iter(self._last))]
            angles = self._frames(key)
        self._last[key] = angles
        return angles

    def _frames(self, temporal_indices: tuple[int, ...]) -> Angles:
        """Made of views of the tables, so that no index crosses the bus."""
        for index in temporal_indices:
            self._check_index(index, index)
        frames = len(temporal_indices)
        rows = [
            self._temporal[i : i + 1] if i >= 0 else self._temporal[-i : 1 - i].conj_physical()
            for i in temporal_indices
        ]
        time = torch.cat(rows) if rows else self._temporal[:0]
        shape = (frames, self.tokens_per_frame, -1)
        turns = torch.cat([time[:, None].expand(shape), self._spatial.expand(shape)], dim=-1)
        return Angles(turns.flatten(0, 1)[:, None])

    def tokens(self, temporal_index: Tensor, token: Tensor) -> Angles:
        """Angles of single tokens: temporal index [rows] and position in the frame [rows].

        Negative indices turn the other way. Indices outside the table raise IndexError, which is checked
        where they are on the CPU; a GPU is not waited for.
        """
        if temporal_index.device.type == "cpu" and len(temporal_index):
            self._check_index(int(temporal_index.min()), int(temporal_index.max()))
        device = self._temporal.device
        temporal_index, token = to_device(temporal_index, device), to_device(token, device)
        time = self._temporal[temporal_index.abs()]
        time = torch.where(temporal_index[:, None] < 0, time.conj_physical(), time)
        return Angles(torch.cat([time, self._spatial[token]], dim=-1)[:, None])

    def _check_index(self, least: int, greatest: int) -> None:
        end = len(self._temporal)
        for index in (least, greatest):
            if abs(index) >= end:
                raise IndexError(f"temporal RoPE index {index} lies outside the table of rotations, 0..{end - 1}")


def _turns(angles: Tensor) -> Tensor:
    """Points of the unit circle, complex64, each part rounded from float64."""
    return torch.complex(angles.cos().float(), angles.sin().float())


def _table(indices: int, pairs: int) -> Tensor:
    """Angles [indices, pairs] in float64: index · 10000^(-pair / pairs)."""
    frequency = torch.pow(10000.0, -torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
    return torch.arange(indices, dtype=torch.float64)[:, None] * frequency


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn the channel pairs of x [..., rows, heads, head_dim] by `angles`, in float32, back to x's dtype."""
    return _turned(x, angles).to(x.dtype)


def rotate_into(out: Tensor, x: Tensor, angles: Angles) -> None:
    """`rotate` into `out`, of the shape and dtype of x: the same bits, without a tensor in between."""
    if x.dtype == torch.float32 and _one_product(x):
        torch.mul(_pairs(x), angles.turns, out=_pairs(out))
    else:
        out.copy_(_turned(x, angles))


def _turned(x: Tensor, angles: Angles) -> Tensor:
    """In float32. Pairs are complex numbers, and one product turns them all."""
    if _one_product(x):
        return torch.view_as_real(_pairs(x.float()) * angles.turns).flatten(-2)
    cos, sin = angles.turns.real, angles.turns.imag
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _one_product(x: Tensor) -> bool:
    """Whether a complex product rounds as the four real products do, each on its own.

    On the CPU torch's vectors do. What is left over beside whole vectors, at the end of a row or of a thread's share,
    is computed with fused multiply-adds, so both must be whole vectors for the bits to be independent of threads.
    """
    pairs, values = x.shape[-1] // 2, x.numel() // 2
    if x.device.type != "cpu":
        return True
    threads = min(torch.get_num_threads(), max(1, -(-values // _THREAD_GRAIN)))
    return pairs % _VECTOR == 0 and -(-values // threads) % _VECTOR == 0


def _pairs(x: Tensor) -> Tensor:
    """Channels [..., head_dim] of float32 as complex numbers [..., head_dim / 2]; a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))

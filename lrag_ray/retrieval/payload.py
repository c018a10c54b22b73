"""How the history bank stores a frame: as it is, or quantised.

A frame is quantised once, when it is admitted, and every reader sees the values that come back out of it; so where a
frame is kept never changes a bit. The newest frames are in the window, which is never quantised.

- ``exact``: the rollout's own precision.
- ``bf16``: bfloat16; the same bits as ``exact`` in a bfloat16 rollout.
- ``int8``: symmetric, one float32 scale per token and head.
- ``int4``: a bfloat16 minimum and step per channel of K (over the frame's tokens) and per token and head of V, as keys
  have outlier channels and values have none (KIVI, arXiv 2402.02750).
- ``…_hadamard``: K is rotated by a Hadamard transform over `head_dim` first, which spreads its outlier channels
  (QuaRot, arXiv 2404.00456). Where `head_dim` is not a power of two, over the largest one that divides it.

All arithmetic is float32, one IEEE operation at a time and without matrix products: the bits depend neither on the
device nor on how many frames are read at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from lrag_ray.retrieval.bank_types import BankType

_ALIGNMENT = 16
"""Bytes; every part of a layer begins at a multiple, so that it can be viewed in its own type."""


class FrameShape(NamedTuple):
    """Sizes of the keys and values of one latent frame."""

    layers: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def of_layer(self) -> tuple[int, int, int]:
        """[f, H, head_dim], of K or V."""
        return self.tokens, self.heads, self.head_dim


class Payload(ABC):
    """Packs K and V of a frame into bytes uint8 [layers, layer_bytes] and back, layer by layer."""

    def __init__(self, shape: FrameShape, dtype: torch.dtype) -> None:
        """`dtype` is the rollout's: what is unpacked has it."""
        self.shape, self.dtype = shape, dtype
        self._ends: list[tuple[int, int]] = []
        """Begin and end of every part in a layer's bytes."""
        self.layer_bytes = 0
        for nbytes in self._part_bytes():
            self._ends.append((self.layer_bytes, self.layer_bytes + nbytes))
            self.layer_bytes += -(-nbytes // _ALIGNMENT) * _ALIGNMENT

    @property
    def frame_bytes(self) -> int:
        """Bytes of a packed frame."""
        return self.shape.layers * self.layer_bytes

    def pack(self, rows: Tensor) -> Tensor:
        """Bytes of K and V [2, layers, f, H, head_dim], on the same device."""
        packed = torch.empty(self.shape.layers, self.layer_bytes, dtype=torch.uint8, device=rows.device)
        self.pack_into(packed, rows)
        return packed

    @abstractmethod
    def pack_into(self, packed: Tensor, rows: Tensor) -> None:
        """Write the bytes of `rows` [2, layers, f, H, head_dim] to `packed` [layers, layer_bytes], on one device."""

    @abstractmethod
    def unpack(self, packed: Tensor) -> Tensor:
        """K and V [n, 2, f, H, head_dim] of one layer of n frames from `packed` [n, layer_bytes]; may be a view."""

    def read_host(self, packed: list[Tensor]) -> list[Tensor]:
        """`unpack` of frames [layer_bytes] that lie apart in host memory, in as few tensors as that allows."""
        return [self.unpack(torch.stack(packed))] if packed else []

    @abstractmethod
    def _part_bytes(self) -> list[int]:
        """Sizes of the parts of a layer."""

    def _part(self, packed: Tensor, index: int, dtype: torch.dtype, *shape: int) -> Tensor:
        """A view of one part [rows, *shape]."""
        begin, end = self._ends[index]
        return packed[:, begin:end].view(dtype).view(len(packed), *shape)


class _Plain(Payload):
    """Values as they are, in the rollout's type or another float."""

    stored: torch.dtype

    def __init__(self, shape: FrameShape, dtype: torch.dtype, stored: torch.dtype) -> None:
        self.stored = stored
        super().__init__(shape, dtype)

    def _part_bytes(self) -> list[int]:
        return [2 * math.prod(self.shape.of_layer) * self.stored.itemsize]

    def pack_into(self, packed: Tensor, rows: Tensor) -> None:
        self._part(packed, 0, self.stored, 2, *self.shape.of_layer).copy_(rows.transpose(0, 1))

    def unpack(self, packed: Tensor) -> Tensor:
        return self._part(packed, 0, self.stored, 2, *self.shape.of_layer).to(self.dtype)

    def read_host(self, packed: list[Tensor]) -> list[Tensor]:
        """Views, one per frame."""
        return [self.unpack(each[None]) for each in packed]


class _Quantised(Payload):
    """What int8 and int4 share: float32 in between, and the Hadamard transform of K."""

    def __init__(self, shape: FrameShape, dtype: torch.dtype, *, hadamard: bool) -> None:
        self._width = shape.head_dim & -shape.head_dim if hadamard else 1
        super().__init__(shape, dtype)

    def pack_into(self, packed: Tensor, rows: Tensor) -> None:
        for index, x in enumerate(rows):
            values = x.to(torch.float32)
            self._quantise(packed, index, hadamard(values, self._width) if index == 0 else values)

    def unpack(self, packed: Tensor) -> Tensor:
        made = torch.empty((len(packed), 2, *self.shape.of_layer), dtype=self.dtype, device=packed.device)
        if self._width == 1:
            self._restore(packed, made[:, 0], made[:, 1])
        else:
            k = torch.empty((len(packed), *self.shape.of_layer), dtype=torch.float32, device=packed.device)
            self._restore(packed, k, made[:, 1])
            made[:, 0] = hadamard(k, self._width)
        return made

    @abstractmethod
    def _quantise(self, packed: Tensor, index: int, x: Tensor) -> None:
        """Store K (index 0) or V (1) [layers, f, H, head_dim]."""

    @abstractmethod
    def _restore(self, packed: Tensor, k: Tensor, v: Tensor) -> None:
        """Compute K and V in float32 and write them to `k` and `v` [n, f, H, head_dim] of any float type."""


class _Int8(_Quantised):
    _LEVELS = 127

    def _part_bytes(self) -> list[int]:
        values, scales = math.prod(self.shape.of_layer), 4 * self.shape.tokens * self.shape.heads
        return [values, values, scales, scales]

    def _quantise(self, packed: Tensor, index: int, x: Tensor) -> None:
        scale = x.abs().amax(dim=-1, keepdim=True) / self._LEVELS
        levels = (x / torch.where(scale == 0, 1, scale)).round()
        self._part(packed, index, torch.int8, *self.shape.of_layer).copy_(levels)
        self._scales(packed, index).copy_(scale)

    def _restore(self, packed: Tensor, k: Tensor, v: Tensor) -> None:
        for index, out in enumerate((k, v)):
            levels = self._part(packed, index, torch.int8, *self.shape.of_layer)
            torch.mul(levels, self._scales(packed, index), out=out)

    def _scales(self, packed: Tensor, index: int) -> Tensor:
        return self._part(packed, 2 + index, torch.float32, self.shape.tokens, self.shape.heads, 1)


class _Int4(_Quantised):
    _LEVELS = 15

    def _part_bytes(self) -> list[int]:
        nibbles = math.prod(self.shape.of_layer) // 2
        k, v = (2 * math.prod(self._groups(index)) for index in (0, 1))
        return [nibbles, nibbles, k, v, k, v]

    def _groups(self, index: int) -> tuple[int, int, int]:
        """Values that share a minimum and a step: over the tokens for K, over the channels for V."""
        tokens, heads, head_dim = self.shape.of_layer
        return (1, heads, head_dim) if index == 0 else (tokens, heads, 1)

    def _quantise(self, packed: Tensor, index: int, x: Tensor) -> None:
        along = 1 if index == 0 else -1
        low, high = x.amin(dim=along, keepdim=True), x.amax(dim=along, keepdim=True)
        # Levels are counted with the minimum and the step as they are stored.
        low = low.to(torch.bfloat16)
        step = ((high - low) / self._LEVELS).to(torch.bfloat16)
        levels = ((x - low) / torch.where(step == 0, 1, step)).round().clamp(0, self._LEVELS).to(torch.uint8)
        tokens, heads, head_dim = self.shape.of_layer
        nibbles = self._part(packed, index, torch.uint8, tokens, heads, head_dim // 2)
        nibbles.copy_(levels[..., : head_dim // 2] | levels[..., head_dim // 2 :] << 4)
        self._part(packed, 2 + index, torch.bfloat16, *self._groups(index)).copy_(low)
        self._part(packed, 4 + index, torch.bfloat16, *self._groups(index)).copy_(step)

    def _restore(self, packed: Tensor, k: Tensor, v: Tensor) -> None:
        """K and V are unpacked together, in five launches. A level has 4 bits and a step 8, so
        their product is exact, and the sum is the same whether or not a device rounds between them."""
        tokens, heads, head_dim = self.shape.of_layer
        half, v_begin = head_dim // 2, self._ends[1][0]
        shape = (len(packed), 2, tokens, heads, half)
        nibbles = packed.as_strided(shape, (packed.stride(0), v_begin, heads * half, half, 1))
        levels = torch.empty((*shape[:-1], head_dim), dtype=torch.uint8, device=packed.device)
        torch.bitwise_and(nibbles, 15, out=levels[..., :half])
        torch.bitwise_right_shift(nibbles, 4, out=levels[..., half:])
        begin = self._ends[2][0]
        scales = packed[:, begin : self._ends[5][1]].view(torch.bfloat16).to(torch.float32)
        for index, out in enumerate((k, v)):
            low, step = (
                scales[:, (first - begin) // 2 : (end - begin) // 2].view(-1, *self._groups(index))
                for first, end in (self._ends[2 + index], self._ends[4 + index])
            )
            torch.addcmul(low, levels[:, index], step, out=out)


def hadamard(x: Tensor, width: int) -> Tensor:
    """Orthonormal Hadamard transform of the last axis in groups of `width`, a power of two; its own inverse.

    By sums and differences, not by a product with the matrix, whose kernel and order of sums depend on the shape.
    """
    if width == 1:
        return x
    grouped = x.unflatten(-1, (-1, width))
    half = 1
    while half < width:
        pairs = grouped.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        grouped = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return (grouped * width**-0.5).flatten(-2)


def make_payload(kind: BankType, shape: FrameShape, dtype: torch.dtype) -> Payload:
    """The payload of a storage type for frames of this shape in a rollout of this precision."""
    if kind == "exact":
        return _Plain(shape, dtype, dtype)
    if kind == "bf16":
        return _Plain(shape, dtype, torch.bfloat16)
    quantised = _Int8 if kind.startswith("int8") else _Int4
    return quantised(shape, dtype, hadamard=kind.endswith("hadamard"))

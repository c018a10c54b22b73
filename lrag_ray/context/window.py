"""The KV cache of one batch element: whole latent frames, a fixed sink and a first-in first-out rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lrag_ray.context.policy import Layout, Span


class KVWindow:
    """Unrotated K and V of the cached frames in slots [slots, 2, layers, f, H, head_dim].

    Sink frames 0 .. sink-1 keep slots 0 .. sink-1; the rest is a ring, so nothing is ever shifted. Bookkeeping is in
    Python integers: no device synchronisation.
    """

    def __init__(self, layout: Layout, sink: int, capacity: int | None) -> None:
        """`capacity` in frames, sink included; None keeps every frame and grows."""
        self.layout = layout
        self.sink = sink
        self.capacity = capacity
        self.frames: list[int] = []
        """Cached frames, oldest first."""
        self._slots = self._allocate(capacity if capacity is not None else sink + 8 * layout.frames_per_block)

    def drop_oldest(self, count: int) -> list[int]:
        """Forget the `count` oldest frames behind the sink and return them; their rows stay until overwritten."""
        if count <= 0:
            return []
        held = min(self.sink, len(self.frames))
        dropped = self.frames[held : held + count]
        if len(dropped) < count:
            raise ValueError(f"cannot drop {count} frames behind a sink of {self.sink}: {len(self.frames)} are cached")
        del self.frames[held : held + count]
        return dropped

    def admit(self, frames: list[int]) -> None:
        """Make the frames of a block part of the cache; `write` fills them layer by layer."""
        self.frames.extend(frames)
        if self.capacity is None:
            self._grow(self.frames[-1] + 1)
        elif len(self.frames) > self.capacity:
            raise ValueError(f"{len(self.frames)} frames in a cache of {self.capacity}: drop the oldest first")

    def write(self, layer: int, frames: list[int], k: Tensor, v: Tensor) -> None:
        """Store K and V [frames · f, H, head_dim] of one layer."""
        f = self.layout.tokens_per_frame
        for i, frame in enumerate(frames):
            slot = self._slots[self._slot(frame)]
            slot[0, layer] = k[i * f : (i + 1) * f]
            slot[1, layer] = v[i * f : (i + 1) * f]

    @property
    def frame_bytes(self) -> int:
        """Bytes of K and V of one frame over all layers."""
        return self._slots[0].nbytes

    def rows(self, frame: int) -> Tensor:
        """K and V of one frame over all layers [2, layers, f, H, head_dim] (a view)."""
        return self._slots[self._slot(frame)]

    def spans(self, layer: int, frames: list[int]) -> list[Span]:
        """Rows of `frames`, together where their slots are neighbours; views, nothing is copied."""
        spans = []
        slots = [self._slot(frame) for frame in frames]
        start = 0
        for i in range(1, len(slots) + 1):
            if i == len(slots) or slots[i] != slots[i - 1] + 1:
                if i > start:
                    run = self._slots[slots[start] : slots[i - 1] + 1, :, layer]
                    spans.append(Span(run[:, 0], run[:, 1]))
                start = i
        return spans

    def _slot(self, frame: int) -> int:
        if self.capacity is None or frame < self.sink:
            return frame
        return self.sink + (frame - self.sink) % (self.capacity - self.sink)

    def _allocate(self, slots: int) -> Tensor:
        at = self.layout
        shape = (slots, 2, at.num_layers, at.tokens_per_frame, at.num_heads, at.head_dim)
        return torch.empty(shape, dtype=at.dtype, device=at.device)

    def _grow(self, frames: int) -> None:
        if frames > len(self._slots):
            larger = self._allocate(max(frames, 2 * len(self._slots)))
            larger[: len(self._slots)] = self._slots
            self._slots = larger

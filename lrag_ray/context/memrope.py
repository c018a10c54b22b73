"""MemRoPE: all frames that left the window, as two memory frames that are moving averages of their keys and values.

Notation of the paper (arXiv 2603.12513): window W, sink S, long memory L and short memory M with rates
alpha_long and alpha_short; n frames per block. Until the window overflows, everything is attended to as in ∞-RoPE. From
then on a block attends to [S sink frames | L | M | the newest past frames | the block], W frames in all, with slot
numbers as temporal indices: L at S, M at S + 1, queries at W-n .. W-1.

Before a block that overflows the window, with E the past frames that leave for it:

- first overflow: L and M take two slots, so n + 2 frames leave in windows of whole blocks, and L = M = mean(E);
- later: L = alpha_long · mean(E) + (1 - alpha_long) · L, and M the same with alpha_short.

mean(E) is one vector per layer and head, over all tokens of E; the rows of a memory frame differ by their rotation
alone. With `adaptive` the mean is per token position, and so is M's rate: it grows with the distance of the position's
mean key from M's, from alpha_short / 10 to 5 · alpha_short at the most distant position.

The memory is kept unrotated and in float32: in bfloat16, the released precision, a rate of 0.01 is partly rounded away.
The released code loses two frames at the first overflow, S and S + 1, which then enter no memory although the paper
says that all past frames do; `first_overflow: released` does the same.

Follows the behaviour of YoungRaeKimm/MemRoPE at b89bf5b (Apache-2.0; its model file is headed CC-BY-NC-SA-4.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lrag_ray.context.frames import FramePolicy, FrameRow, check_limited, check_local_room, check_window
from lrag_ray.context.policy import Origin, PolicyInputs, Span

LONG, SHORT = -1, -2
"""Frame numbers of the memory frames in traces."""
_MEMORIES = 2


@dataclass(frozen=True)
class MemRopeSettings:
    """Settings of memrope; the rates are the paper's, the window is that of the equal budget."""

    window: int = 12
    """Latent frames attended to (W): sink, two memory frames, recent frames and the current block."""
    sink: int = 1
    """First latent frames, which are never dropped (S)."""
    alpha_long: float = 0.01
    """Weight of the frames that leave in the long memory."""
    alpha_short: float = 0.1
    """Weight of the frames that leave in the short memory."""
    adaptive: bool = False
    """Average per token position, with a rate of the short memory per position."""
    first_overflow: Literal["all", "released"] = "all"
    """Frames that the memories begin with: all that leave at the first overflow, or all but the first two of them."""

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)
        check_limited(self.window)
        for name in ("alpha_long", "alpha_short"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0 and at most 1")


class MemRope(FramePolicy[MemRopeSettings]):
    """Keeps the first and the newest frames and two moving averages of all that left."""

    Settings = MemRopeSettings
    as_released: ClassVar[Mapping[str, Any]] = {"first_overflow": "released"}
    released: ClassVar[Mapping[str, Any]] = {"window": 12, "sink": 3, "first_overflow": "released"}
    origin = Origin(
        "memory",
        "MemRoPE, arXiv 2603.12513",
        "YoungRaeKimm/MemRoPE",
        "Apache-2.0; its model file CC-BY-NC-SA-4.0",
    )
    restrictions: ClassVar[Sequence[str]] = ("a limited window: sink, 2 memory frames and a past block at least",)

    @classmethod
    def check(cls, settings: MemRopeSettings, frames_per_block: int) -> None:
        """The window must leave a block's worth of frames beside sink and memory."""
        check_local_room(settings.window, frames_per_block, sink=settings.sink, memory=_MEMORIES)

    @classmethod
    def device_bytes(
        cls, settings: MemRopeSettings, frames_per_block: int, total_frames: int, kv_bytes_per_frame: int
    ) -> int:
        """With `adaptive` both memories and a mean in float32; otherwise a few vectors."""
        return 2 * (_MEMORIES + 1) * kv_bytes_per_frame if settings.adaptive else 0

    def __init__(self, settings: MemRopeSettings, inputs: PolicyInputs) -> None:
        super().__init__(settings, inputs)
        self._long: Tensor | None = None
        """Unrotated K and V over all layers, [2, layers, f or 1, H, head_dim] in float32; None before the overflow."""
        self._short: Tensor | None = None

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Move what leaves into the memories, and attend to everything at its slot number."""
        self.block = block
        leaving = self._leave()
        if leaving:
            self._remember(leaving)
        cached, sink = self.window.frames, self.settings.sink
        rows = self.cached_rows(cached, cached)
        if self._long is not None:
            rows[sink:sink] = [FrameRow("memory", LONG, LONG), FrameRow("memory", SHORT, SHORT)]
        self.at_slots(rows)

    def context_spans(self, layer: int) -> list[Span]:
        """Rows of sink, memories and recent frames in one layer."""
        cached, sink = [row.frame for row in self.context if row.frame >= 0], self.settings.sink
        memories = [self._rows(memory, layer) for memory in (self._long, self._short) if memory is not None]
        return [*self.window.spans(layer, cached[:sink]), *memories, *self.window.spans(layer, cached[sink:])]

    def _leave(self) -> list[int]:
        """Drop what must leave for the current block, oldest first."""
        needed = len(self.window.frames) + self.layout.frames_per_block
        if self._long is None and needed <= self.settings.window:
            return []
        return self.window.drop_oldest(needed + _MEMORIES - self.settings.window)

    def _remember(self, frames: list[int]) -> None:
        """Begin or update both memories with the frames that leave."""
        if self._long is None or self._short is None:
            lost = _MEMORIES if self.settings.first_overflow == "released" else 0
            self._long = self._mean(frames[lost:])
            self._short = self._long.clone()
            return
        mean, rate = self._mean(frames), self.settings.alpha_short
        self._long = self.settings.alpha_long * mean + (1 - self.settings.alpha_long) * self._long
        short_rate = self._rates(mean, self._short) if self.settings.adaptive else rate
        self._short = short_rate * mean + (1 - short_rate) * self._short

    def _mean(self, frames: list[int]) -> Tensor:
        """Mean of cached frames, [2, layers, f, H, head_dim] if `adaptive`, else [2, layers, 1, H, head_dim]."""
        total: Tensor | None = None
        for frame in frames:
            rows = self.window.rows(frame)
            if not self.settings.adaptive:
                rows = rows.mean(dim=2, keepdim=True, dtype=torch.float32)
            total = rows.to(torch.float32, copy=True) if total is None else total.add_(rows)
        assert total is not None, "a block that overflows the window makes frames leave"
        return total.div_(len(frames))

    def _rates(self, mean: Tensor, memory: Tensor) -> Tensor:
        """Rate of each layer and token position [layers, f, 1, 1] from the change of the keys."""
        least, most = 0.1 * self.settings.alpha_short, 5 * self.settings.alpha_short
        change = (mean[0] - memory[0]).norm(dim=-1).mean(dim=-1)
        relative = change / (change.amax(dim=-1, keepdim=True) + 1e-8)
        return (least + relative * (most - least))[..., None, None]

    def _rows(self, memory: Tensor, layer: int) -> Span:
        """A memory as f rows in the precision of the cache."""
        rows = memory[:, layer].to(self.layout.dtype).expand(-1, self.layout.tokens_per_frame, -1, -1)
        return Span(rows[0], rows[1])

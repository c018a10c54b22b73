"""MemFlow: sink and window of base, and a bank of earlier frames that suit the prompt, chosen in every layer.

Notation: window W, sink S, bank of B frames, record_interval rho (in blocks); n frames per block, temporal indices are
global frame numbers everywhere. The bank comes on top of the window: W + B frames are attended to, in the order
[sink | bank | local | current]. A frame may be in the bank and in sink or window at once and is then attended to twice.

Before block b >= 1 the first frame x of block b-1 is recorded, with j = (b-1) div rho:

- j < B: slot j of the bank becomes x, so every interval leaves the first frame of its last block;
- j >= B: of the B frames in the bank the B-1 best stay, best first, and x is appended. This happens at every block.

A frame's score in a layer is the mean, over the rows of the text, the heads and the frame's tokens, of
k_text · k / sqrt(head_dim). k are the frame's keys, rotated at its own index, k_text the layer's cross-attention keys
of the prompt, padding included; there is no softmax. Both stay what they are, so a frame is scored once, when it is
recorded. (The paper, arXiv 2512.14699, scores with the text's queries and a softmax; this is the released rule.)

The released model adds a LoRA that was trained with the bank. The bank itself has no weights and runs on any backbone.
Not here: the selection per head and pass that both released configurations switch off (SMA), and the interactive
pipeline with its prompt switches. Follows the behaviour of KlingTeam/MemFlow at 7ed5147 (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lrag_ray.context.frames import FramePolicy, FrameRow, check_limited, check_window, frames_in_window
from lrag_ray.context.policy import Exposure, Origin, PolicyInputs, Span
from lrag_ray.context.trace import TraceRow
from lrag_ray.retrieval.similarity import HostCopy
from lrag_ray.wan.rope import MAX_INDEX, rotate


@dataclass(frozen=True)
class MemFlowSettings:
    """Settings of memflow; the defaults attend to 12 frames in all, as the other methods do."""

    window: int = 9
    """Latent frames of sink, local part and current block (W); those of the bank come on top."""
    sink: int = 1
    """First latent frames, which are never dropped (S); at least 1."""
    bank: int = 3
    """Frames in the bank (B)."""
    record_interval: int = 3
    """Blocks that share a slot of the bank until it is full (rho)."""

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)
        check_limited(self.window)
        for name in ("sink", "bank", "record_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")

    def recorded(self, block: int) -> int:
        """Frames in the bank when `block` is generated."""
        return min((block - 1) // self.record_interval + 1, self.bank)


class _Banked(NamedTuple):
    """A frame in the bank of one layer."""

    frame: int
    slot: int
    """Where its rows are; the order of slots means nothing once frames are selected."""


class MemFlow(FramePolicy[MemFlowSettings]):
    """Keeps the first and the newest frames and a small bank of earlier ones that suit the prompt."""

    Settings = MemFlowSettings
    max_frames: ClassVar[int | None] = MAX_INDEX
    released: ClassVar[Mapping[str, Any]] = {"window": 12, "sink": 3}
    origin = Origin("memory", "MemFlow, arXiv 2512.14699", "KlingTeam/MemFlow", "Apache-2.0")
    restrictions: ClassVar[Sequence[str]] = ("a limited window; sink of at least 1",)

    @classmethod
    def attended_frames(cls, settings: MemFlowSettings, frames_per_block: int, first_frame: int) -> int:
        """Window and bank."""
        window = frames_in_window(settings.window, frames_per_block, first_frame)
        return window + settings.recorded(first_frame // frames_per_block)

    def __init__(self, settings: MemFlowSettings, inputs: PolicyInputs) -> None:
        super().__init__(settings, inputs)
        at = self.layout
        shape = (settings.bank, 2, at.num_layers, at.tokens_per_frame, at.num_heads, at.head_dim)
        self._rows = torch.empty(shape, dtype=at.dtype, device=at.device)
        """Unrotated K and V of the bank by slot."""
        self._banks: list[list[_Banked]] = [[] for _ in range(at.num_layers)]
        """The bank of each layer, in attention order."""
        # The mean over the text's rows can be taken first, because the score is linear in them.
        self._text = [keys.float().mean(dim=0) for keys in inputs.text_keys]
        self._layer_scores: list[Tensor] = []
        self._coming: list[tuple[int, HostCopy]] = []
        """Recorded frames whose scores are on their way to the host."""
        self._scores: dict[int, list[float]] = {}
        """Scores of the frames in the bank, by layer."""

    def max_context_rows(self) -> int | None:
        """Window and bank without the current block."""
        frames = self.settings.window + self.settings.bank
        return frames * self.layout.tokens_per_frame - self.layout.tokens_per_block

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Record the first frame of the block before, then make room."""
        if block:
            self._record(block)
        self.make_room(block)
        cached = list(self.window.frames)
        self.context = self.cached_rows(cached, cached)
        self.current = self.current_rows(self.block_frames())

    def begin_expose(self) -> None:
        """Nothing is shared: layers have banks of their own."""

    def expose(self, layer: int) -> Exposure:
        """Sink, bank and local frames of one layer."""
        rows, sink = self._layer_context(layer), self.settings.sink
        cached = [row.frame for row in self.context]
        bank = [Span(self._rows[each.slot, 0, layer], self._rows[each.slot, 1, layer]) for each in self._banks[layer]]
        spans = [*self.window.spans(layer, cached[:sink]), *bank, *self.window.spans(layer, cached[sink:])]
        return Exposure(spans, self.rope.frames([row.temporal_index for row in rows]))

    def begin_store(self) -> None:
        """Score the block's first frame on the way."""
        super().begin_store()
        self._layer_scores = []
        self._turn = self.rope.frames(self.block_frames()[:1])

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Cache the block's clean rows; score its first frame in this layer."""
        super().store(layer, k, v)
        keys = rotate(k[: self.layout.tokens_per_frame], self._turn).float().mean(dim=0)
        self._layer_scores.append((keys * self._text[layer]).sum())

    def end_block(self) -> None:
        """Send the scores to the host; they are needed when the block after the next one chooses."""
        scale = self.layout.num_heads * math.sqrt(self.layout.head_dim)
        self._coming.append((self.block_frames()[0], HostCopy(torch.stack(self._layer_scores) / scale)))

    def trace(self) -> list[TraceRow]:
        """Per layer, because each has a bank of its own."""
        if not self.block:
            return super().trace()
        self._arrive()
        tokens = self.layout.tokens_per_frame
        return [
            TraceRow(self.block, layer, row.kind, row.frame, row.temporal_index, tokens, row.similarity)
            for layer in range(self.layout.num_layers)
            for row in [*self._layer_context(layer), *self.current]
        ]

    def _record(self, block: int) -> None:
        """Put the first frame of the block before into every layer's bank."""
        frame = (block - 1) * self.layout.frames_per_block
        rows, slot = self.window.rows(frame), (block - 1) // self.settings.record_interval
        if slot < self.settings.bank:
            self._rows[slot] = rows
            self._banks = [[*bank[:slot], _Banked(frame, slot)] for bank in self._banks]
            return
        self._arrive()
        for layer, bank in enumerate(self._banks):
            # Sorting is stable: of equal scores the first stays first.
            *kept, dropped = sorted(bank, key=lambda each: -self._scores[each.frame][layer])
            self._rows[dropped.slot, :, layer] = rows[:, layer]
            self._banks[layer] = [*kept, _Banked(frame, dropped.slot)]

    def _arrive(self) -> None:
        """Read the scores that have arrived: all but the newest, whose pass the device may still be busy with."""
        while len(self._coming) > 1:
            frame, scores = self._coming.pop(0)
            self._scores[frame] = scores.read().tolist()
        banked = {each.frame for bank in self._banks for each in bank}
        self._scores = {frame: scores for frame, scores in self._scores.items() if frame in banked}

    def _layer_context(self, layer: int) -> list[FrameRow]:
        """The frames before the block in one layer, in attention order."""
        sink = self.settings.sink
        bank = [
            FrameRow(
                "memory",
                each.frame,
                each.frame,
                self._scores[each.frame][layer] if each.frame in self._scores else None,
            )
            for each in self._banks[layer]
        ]
        return [*self.context[:sink], *bank, *self.context[sink:]]

"""What each block of a training sequence attends to: the contexts of base, ∞-RoPE and LongLive-RAG, without a rollout.

A sequence is some of a rollout's frames with their true latents, in whole blocks, and noisy copies of the blocks that
are learned. Three kinds: the first turn from its beginning, of which any block is learned or the first alone; or the
first block, a piece of an earlier turn and, turns later, a ride over the same places. Where a context's frame is not in
the sequence it is absent from it, as before the window has filled; temporal indices are those of the whole rollout.
`tests/world/test_teacher.py` compares the outcome with a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrag_ray.context.rag import RETRIEVED_INDEX, RagSettings
from lrag_ray.world.scenes import TURN

Method = Literal["base", "infinity_rope", "rag"]
BLOCK = 3
"""Latent frames per block."""


@dataclass(frozen=True)
class Budget:
    """Frames of a context; the defaults are those of the methods."""

    window: int = 12
    sink: int = 1
    top_k: int = 6
    recent_exclude: int = 5

    def rag(self) -> RagSettings:
        """As the method's settings."""
        return RagSettings(self.window, self.sink, self.top_k, self.recent_exclude, "avg_pool")


class Frames(NamedTuple):
    """Frames of a sequence: `clean` ones in whole blocks, and the first frames of the blocks that are `learned`."""

    clean: list[int]
    learned: list[int]

    def spans(self) -> tuple[list[int], list[int], list[int]]:
        """Clean frames of the first block, of what comes before the last LEARNED blocks, and of those."""
        return self.clean[:BLOCK], self.clean[BLOCK : -LEARNED * BLOCK], self.clean[-LEARNED * BLOCK :]


class Context(NamedTuple):
    """Slots of the frames that a block attends to before its own, their temporal indices, and its own first index."""

    slots: list[int]
    indices: list[int]
    own: int


PIECE = 18
"""Frames of the piece of an earlier turn."""
LEARNED = 4
"""Blocks that are learned in a sequence."""


def opening() -> Frames:
    """The beginning of a rollout, and copies of its first block, of which the prompt alone knows anything."""
    return Frames(list(range((1 + PIECE // BLOCK + LEARNED) * BLOCK)), [0] * LEARNED)


def first_turn(draw: np.random.Generator) -> Frames:
    """The beginning of a rollout, and any of its blocks."""
    blocks = 1 + PIECE // BLOCK + LEARNED
    learned = sorted(draw.choice(blocks, LEARNED, replace=False).tolist())
    return Frames(list(range(blocks * BLOCK)), [block * BLOCK for block in learned])


def later_turn(draw: np.random.Generator) -> Frames:
    """The first block, a piece of an earlier turn, and blocks that come by the same places one to four turns later."""
    piece = BLOCK * int(draw.integers(1, TURN // BLOCK))
    again = piece + TURN * int(draw.integers(1, 5)) + BLOCK * int(draw.integers(2))
    clean = [*range(BLOCK), *range(piece, piece + PIECE), *range(again, again + LEARNED * BLOCK)]
    return Frames(clean, [again + BLOCK * (1 + i) for i in range(LEARNED)])


Similar = Callable[[int, list[int]], list[int]]
"""The eligible frames, best first, for the frame that asks."""


def context_of(method: Method, budget: Budget, first: int, slots: dict[int, int], similar: Similar) -> Context:
    """What the block from frame `first` on attends to; `slots` are the places of the sequence's frames."""
    past = min(first, budget.window - BLOCK)
    kept = budget.window - BLOCK - budget.sink
    retrieved: list[int] = []
    if method == "rag":
        kept -= budget.top_k
        rag = budget.rag()
        end = budget.sink + rag.history(first, BLOCK) - budget.recent_exclude
        eligible = [frame for frame in slots if budget.sink <= frame < end]
        if eligible:
            retrieved = similar(first - 1, eligible)[: budget.top_k]
    sink = [frame for frame in range(min(budget.sink, first)) if frame in slots]
    local = [frame for frame in range(max(budget.sink, first - kept), first) if frame in slots]
    frames = [*sink, *retrieved, *local]
    if method == "base":
        return Context([slots[frame] for frame in frames], frames, first)
    # A cached frame has its place in the cache, the sink's first.
    indices = [*sink, *[RETRIEVED_INDEX] * len(retrieved), *(past - (first - frame) for frame in local)]
    return Context([slots[frame] for frame in frames], indices, past)


class Contexts(NamedTuple):
    """Contexts of a batch of sequences, clean blocks first and learned ones behind them.

    G blocks of 3 frames, W frames attended to, own ones last; slots number the frames of a sequence, clean ones first.
    """

    slots: Tensor
    """[B, G, W], 0 where there is none."""
    indices: Tensor
    """Temporal indices [B, G, W]."""
    absent: Tensor
    """bool [B, G, W]."""
    learned_from: int
    """First of the learned blocks."""


def contexts_of(method: Method, budget: Budget, sequence: Frames, similar: Similar) -> Contexts:
    """Of one sequence (B = 1)."""
    slots = {frame: slot for slot, frame in enumerate(sequence.clean)}
    firsts = [*sequence.clean[::BLOCK], *sequence.learned]
    rows = []
    for block, first in enumerate(firsts):
        before = {frame: slot for frame, slot in slots.items() if frame < first}
        context = context_of(method, budget, first, before, similar)
        missing = budget.window - BLOCK - len(context.slots)
        own = range(block * BLOCK, (block + 1) * BLOCK)
        rows.append(
            (
                [*context.slots, *[0] * missing, *own],
                [*context.indices, *[0] * missing, *range(context.own, context.own + BLOCK)],
                [*[False] * len(context.slots), *[True] * missing, *[False] * BLOCK],
            )
        )
    slots_of, indices, absent = (torch.tensor(each)[None] for each in zip(*rows, strict=True))
    return Contexts(slots_of, indices, absent, len(sequence.clean) // BLOCK)


def joined(contexts: Sequence[Contexts]) -> Contexts:
    """A batch of them, of equally many clean frames."""
    return Contexts(
        torch.cat([each.slots for each in contexts]),
        torch.cat([each.indices for each in contexts]),
        torch.cat([each.absent for each in contexts]),
        contexts[0].learned_from,
    )

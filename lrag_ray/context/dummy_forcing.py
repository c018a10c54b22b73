"""Dummy Forcing: every head keeps one of three short contexts, chosen by what it attends to early in the rollout.

Notation: ar_start a is the block that classifies, local_blocks c, num_dummy D; n frames per block, f tokens per frame,
block b starts at frame cs. All temporal indices are global frame numbers; the sink is frame 0.

- Blocks b <= a, all heads: frame 0, the last n·c past frames behind it, and the block.
- In the clean-context pass of block a, r = F div 3 queries of each layer are sampled, with F = f for a = 1, else n·f.
  Over all rows of that pass, the mean attention of each head on the first F rows is `first`, on the block's own rows
  `last`, on the rest `mid`. (For a > 1 the first F rows reach into the local frames: the released rule.)
- Over all layers and heads together, p0 = first / sum(first), p1 = mid / sum(mid), cost = max(p0, p1). The D heads of
  the smallest cost are dummy heads; of the others those with p0 < p1 look at the past, the rest at the first frame.
- Blocks b > a, before the block itself: the heads of class 0 (first) attend to frame 0, those of class 1 (mid) to the
  last n·c past frames behind it, those of class 2 (dummy) to frame cs-1.

Training-free. Released with a = 1, c = 1 for Self-Forcing and a = 2, c = 1 for LongLive, D = 180 of 360 heads, and the
sampled queries drawn from the process's generator; here they come from the identity of the rollout's noise. With c = 3,
the default, no head attends to more than 12 frames. Paper: arXiv 2601.20499. Follows the behaviour of
csguoh/DummyForcing at 28128ed (Apache-2.0; its file headers say CC-BY-NC-SA-4.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrag_ray.context.heads import Classification, HeadGroup, HeadPolicy, head_groups
from lrag_ray.context.policy import Origin, PolicyInputs
from lrag_ray.wan.rope import MAX_INDEX

FIRST, MID, DUMMY = 0, 1, 2
"""Classes of heads."""


@dataclass(frozen=True)
class DummyForcingSettings:
    """Settings of dummy_forcing; by default its longest context is 12 frames, the budget of the other methods."""

    ar_start: int = 1
    """Block whose clean-context pass classifies the heads (a)."""
    local_blocks: int = 3
    """Past blocks that heads of the class mid attend to (c)."""
    num_dummy: int | None = None
    """Dummy heads of all layers together (D); null for half of all heads, the released share."""

    def __post_init__(self) -> None:
        for name in ("ar_start", "local_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.num_dummy is not None and self.num_dummy < 0:
            raise ValueError(f"num_dummy {self.num_dummy} must not be negative")

    def first_frames(self, frames_per_block: int) -> int:
        """Frames whose attention counts as `first`."""
        return 1 if self.ar_start == 1 else frames_per_block

    def past_frames(self, frames_per_block: int, first_frame: int) -> int:
        """Frames that all heads attend to before a block that starts at `first_frame`, up to the classification."""
        return min(first_frame, 1 + frames_per_block * self.local_blocks)


class DummyForcing(HeadPolicy[DummyForcingSettings]):
    """Keeps the first frame, the last blocks or the newest past frame, each for other attention heads."""

    Settings = DummyForcingSettings
    max_frames: ClassVar[int | None] = MAX_INDEX
    released: ClassVar[Mapping[str, Any]] = {"local_blocks": 1}
    origin = Origin("per head", "Dummy Forcing, arXiv 2601.20499", "csguoh/DummyForcing", "Apache-2.0")
    restrictions: ClassVar[Sequence[str]] = ("num_dummy at most the heads of all layers",)

    @classmethod
    def check(cls, settings: DummyForcingSettings, frames_per_block: int) -> None:
        """The block that classifies must see rows between the first ones and its own."""
        past = settings.past_frames(frames_per_block, settings.ar_start * frames_per_block)
        first = settings.first_frames(frames_per_block)
        if past <= first:
            raise ValueError(
                f"ar_start {settings.ar_start} and local_blocks {settings.local_blocks}: block {settings.ar_start} "
                f"sees {past} past latent frames in blocks of {frames_per_block}, and telling heads apart takes more "
                f"than {first}: raise ar_start or local_blocks"
            )

    @classmethod
    def check_model(cls, settings: DummyForcingSettings, layers: int, heads: int, tokens_per_frame: int) -> None:
        """There must be as many heads."""
        if settings.num_dummy is not None and settings.num_dummy > layers * heads:
            raise ValueError(
                f"num_dummy {settings.num_dummy} exceeds the {layers * heads} heads of {layers} layers: lower it, or "
                "leave it out for half of them"
            )

    @classmethod
    def attended_frames(cls, settings: DummyForcingSettings, frames_per_block: int, first_frame: int) -> int:
        """By the heads of class mid, which attend to most."""
        n, past = frames_per_block, settings.past_frames(frames_per_block, first_frame)
        return n + (past if first_frame <= settings.ar_start * n else min(n * settings.local_blocks, past - 1))

    @classmethod
    def device_bytes(
        cls, settings: DummyForcingSettings, frames_per_block: int, total_frames: int, kv_bytes_per_frame: int
    ) -> int:
        """Cached frames that no head attends to all of: frame 0 beside the local ones."""
        n = frames_per_block
        last = max(0, total_frames - n)
        cached = settings.past_frames(n, last) + n
        return max(0, cached - cls.attended_frames(settings, n, last)) * kv_bytes_per_frame

    @classmethod
    def notes(cls, settings: DummyForcingSettings, frames_per_block: int) -> Iterable[str]:
        """What the planned numbers leave out."""
        n = frames_per_block
        yield (
            f"operations are counted as if all heads attended to {n + n * settings.local_blocks} latent frames; dummy "
            f"heads and those of the first frame attend to {n + 1}"
        )

    def __init__(self, settings: DummyForcingSettings, inputs: PolicyInputs) -> None:
        n = inputs.layout.frames_per_block
        super().__init__(settings, inputs, sink=1, capacity=1 + n * (settings.local_blocks + 1))

    def max_context_rows(self) -> int | None:
        """Frame 0 and the local frames."""
        return (1 + self.cached_frames(0)) * self.layout.tokens_per_frame

    def classifies(self) -> Classification:
        """By the first rows and the block's own."""
        at, n = self.settings, self.layout.frames_per_block
        first = at.first_frames(n) * self.layout.tokens_per_frame
        return Classification(at.ar_start, first, self.layout.tokens_per_block, max(1, first // 3), 3)

    def classify(self, shares: Tensor) -> Tensor:
        """Dummy heads by the least cost of all layers together, the others by what they look at more."""
        first, mid = shares[..., 0].double(), shares[..., 1].double()
        p0, p1 = first / first.sum(), mid / mid.sum()
        classes = torch.where(p0 < p1, MID, FIRST)
        count = classes.numel() // 2 if self.settings.num_dummy is None else self.settings.num_dummy
        dummy = torch.sort(torch.maximum(p0, p1).flatten(), stable=True).indices[:count]
        return classes.flatten().index_fill(0, dummy, DUMMY).view_as(classes)

    def cached_frames(self, block: int) -> int:
        """The local frames of class mid."""
        return self.layout.frames_per_block * self.settings.local_blocks

    def groups(self, layer: int) -> list[HeadGroup]:
        """By class, once there are classes."""
        if self.classes is None:
            return [HeadGroup(None, self.sink_frames + self.past)]
        frames = {FIRST: self.sink_frames, MID: self.past, DUMMY: self.past[-1:]}
        return [HeadGroup(heads, frames[each]) for each, heads in head_groups(self.classes[layer]).items()]

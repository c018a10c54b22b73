"""ContextPolicy: the interface of a context method, and what it may use.

A policy belongs to one rollout of one batch element. It keeps keys unrotated and decides, once per block and layer,
which rows the block attends to before its own and with which temporal indices; the runtime (`context.runtime`) copies
and rotates them into one buffer [sink | retrieved | local | current] that all passes of the block share.

A new method is one file with a `ContextPolicy` and one line in `context.registry`, or lives elsewhere and is named
``package.module:Policy``. Most methods keep whole frames: derive from `context.frames.FramePolicy` and write
`begin_block` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lrag_ray.context.trace import TraceRow
from lrag_ray.wan.rope import Angles, Rope


@dataclass(frozen=True)
class Layout:
    """Shapes that all policies of a rollout share."""

    num_layers: int
    num_heads: int
    head_dim: int
    grid: tuple[int, int]
    """Rows and columns of tokens in a latent frame."""
    frames_per_block: int
    """Latent frames per block (n)."""
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame (f)."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens_per_block(self) -> int:
        """Tokens of a block (n·f)."""
        return self.frames_per_block * self.tokens_per_frame


@dataclass(frozen=True)
class PolicyInputs:
    """What the runtime hands to a policy when a rollout begins."""

    layout: Layout
    rope: Rope
    key: tuple[str | int, ...] = ()
    """Identity of the rollout's noise, for choices that are meant to be random (see rag, choose: random)."""
    encoder: nn.Module | None = None
    """Retrieval encoder, where `needs_encoder` asks for one: encode(x [N, C, H, W]) -> [N, D]."""


class Span(NamedTuple):
    """Consecutive rows of unrotated K and V of one layer, each [rows, H, head_dim]."""

    k: Tensor
    v: Tensor


class Exposure(NamedTuple):
    """The rows that a block attends to before its own, in attention order, and their turning angles."""

    spans: list[Span]
    angles: Angles


class ContextPolicy(ABC):
    """Which rows a block attends to, and with which temporal index. Hooks are called in the order of this class."""

    Settings: ClassVar[type[Any]]
    """Frozen dataclass of the method's settings; its __post_init__ raises ValueError for impossible values."""
    horizon_free: ClassVar[bool] = True
    """The first blocks do not depend on how long the rollout will be, so shorter durations are prefixes."""
    max_frames: ClassVar[int | None] = None
    """Longest possible rollout in latent frames (absolute temporal indices end at 1023), or None."""
    observes_queries: bool = False
    """Call `observe_queries` in every pass."""

    @classmethod
    def check(cls, settings: Any, frames_per_block: int) -> None:
        """Raise ValueError where the settings do not fit blocks of so many latent frames."""

    @classmethod
    def needs_encoder(cls, settings: Any) -> bool:
        """Whether the method needs a retrieval encoder."""
        return False

    @classmethod
    def history_frames(cls, settings: Any, frames_per_block: int, total_frames: int) -> int:
        """Latent frames held by the history bank at the end of a rollout of `total_frames`."""
        return 0

    @classmethod
    def attended_frames(cls, settings: Any, frames_per_block: int, first_frame: int) -> int:
        """Latent frames attended to by the block that starts at `first_frame`, its own included."""
        window = int(settings.window)
        end = first_frame + frames_per_block
        return end if window == -1 else min(end, window)

    def __init__(self, settings: Any, inputs: PolicyInputs) -> None:
        self.settings = settings
        self.layout = inputs.layout
        self.rope = inputs.rope

    def max_context_rows(self) -> int | None:
        """Most rows that `expose` will ever return, so that buffers are allocated once; None where it is not known."""
        return None

    @abstractmethod
    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Make room and choose, once, before the first pass.

        `state` is given when finished latents are replayed: what `block_state` returned for this block.
        """

    @abstractmethod
    def query_indices(self) -> list[int]:
        """Temporal index of each frame of the current block, for its queries and its own keys."""

    def own_frames(self) -> list[int]:
        """Which of the block's frames 0 .. n-1 the block itself attends to, ascending; all but in odd settings."""
        return list(range(self.layout.frames_per_block))

    def observe_queries(self, layer: int, q: Tensor, q_rotated: Tensor) -> None:
        """Queries [n·f, H, head_dim] of a pass, before attention; only called if `observes_queries`."""

    @abstractmethod
    def expose(self, layer: int) -> Exposure:
        """Rows to attend to before the current block's own; called once per layer, in the block's first pass."""

    def on_latents(self, latents: Tensor) -> None:
        """Clean latents [n, C, H, W] of the block, before its clean-context pass."""

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Unrotated K and V [n·f, H, head_dim] of the block's clean-context pass."""

    def end_block(self) -> None:
        """After the clean-context pass was launched: the place to fetch what the next block will need."""

    @abstractmethod
    def trace(self) -> list[TraceRow]:
        """What the current block attends to, its own frames included, in attention order."""

    def block_state(self) -> dict[str, Tensor]:
        """What `begin_block` needs to replay this block from clean latents alone, as CPU tensors; mostly nothing."""
        return {}

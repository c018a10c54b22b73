"""ContextPolicy: the interface of a context method, and what it may use.

A policy belongs to one rollout of one batch element. It keeps keys unrotated and decides, once per block and layer,
which rows the block attends to before its own and with which temporal indices; the runtime (`context.runtime`) copies
and rotates them into one buffer [sink | retrieved | local | current] that all passes of the block share.

A new method is one file with a `ContextPolicy` and one line in `context.registry`, or lives elsewhere and is named
``package.module:Policy``. The class also declares what the program must know about the method: settings, checks,
weights, memory, notes for the plan. Most methods keep whole frames: derive from `context.frames.FramePolicy` and write
`begin_block` alone.
"""

from __future__ import annotations

import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from lrag_ray.context.trace import TraceRow
from lrag_ray.context.weights import Loaded, WeightFile
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.retrieval.history import HistoryBank, TieredBank, Tiers
from lrag_ray.retrieval.payload import FrameShape, make_payload
from lrag_ray.wan.config import SamplerConfig
from lrag_ray.wan.rope import MAX_INDEX, Angles, Rope

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S")
"""Settings of a method: an instance of its `Settings`."""

Family = Literal["sink", "positions", "compression", "memory", "retrieval", "per head", "sampler", "other"]
"""What a method changes about the context, or else about the sampler; reports group methods by it, in this order."""


class Origin(NamedTuple):
    """Where a method comes from, for people who choose one."""

    family: Family = "other"
    paper: str = ""
    """Title and arXiv number."""
    code: str = ""
    """Repository of the released code that it follows."""
    licence: str = ""
    """Licence of that code; ours follows its behaviour and copies none of it."""


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


def bank_of(kind: BankType = "exact", tiers: Tiers = Tiers()) -> Callable[[Layout], HistoryBank]:  # noqa: B008 - frozen
    """Maker of history banks that store frames as `kind` in these tiers."""

    def make(layout: Layout) -> HistoryBank:
        shape = FrameShape(layout.num_layers, layout.tokens_per_frame, layout.num_heads, layout.head_dim)
        return TieredBank(layout.device, make_payload(kind, shape, layout.dtype), tiers)

    return make


host_bank = bank_of()
"""A history bank that keeps frames as they are, in host memory."""


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy is given when a rollout begins."""

    layout: Layout
    rope: Rope
    key: tuple[str | int, ...] = ()
    """Identity of the rollout's noise, for choices that are meant to be random (see rag, choose: random)."""
    weights: Mapping[str, Loaded] = field(default_factory=dict)
    """The method's own weights on the rollout's device, by `WeightFile.key`: those that its settings use. Shared by
    all policies of a batch, so not to be changed."""
    make_bank: Callable[[Layout], HistoryBank] = host_bank
    """Where history is kept; see `bank`."""
    text_keys: Sequence[Tensor] = ()
    """Cross-attention keys of the prompt in every layer, each [text_len, H, head_dim], padding rows included; fixed for
    the rollout and not to be changed."""

    def bank(self) -> HistoryBank:
        """An empty history bank for this policy alone. Ask for one only if the method keeps history."""
        return self.make_bank(self.layout)


class Span(NamedTuple):
    """Rows of unrotated K and V of one layer, each [rows, H, head_dim] or, of whole frames, [frames, f, H, head_dim].

    Views of any strides will do: the runtime copies every row once, and nothing needs to be contiguous.
    """

    k: Tensor
    v: Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.k.shape[:-2])


class Exposure(NamedTuple):
    """The rows that a block attends to before its own, in attention order, and their turning angles."""

    spans: list[Span]
    """Rows of all heads, also where `heads` names some."""
    angles: Angles
    heads: tuple[int, ...] | None = None
    """Heads that attend to these rows, ascending; None: all of them."""


def summary_of(policy: type[ContextPolicy[Any]]) -> str:
    """First paragraph of the class's own docstring, as one line of at most 300 characters; '' where it has none."""
    paragraph = (vars(policy).get("__doc__") or "").strip().partition("\n\n")[0]
    return textwrap.shorten(paragraph, 300, placeholder=" …")


class ContextPolicy(ABC, Generic[S]):
    """Which rows a block attends to, and with which temporal index.

    The first paragraph of a method's docstring says on report pages what it keeps (`summary_of`). The class methods
    describe the method before anything runs. The hooks of a rollout are called in the order of this class;
    `begin_expose` to `end_expose` in a block's first pass, and `begin_store` to `store` in its last, the clean-context
    pass. Replay runs the clean-context pass alone, which is then both.
    """

    Settings: ClassVar[type[DataclassInstance]]
    """Frozen dataclass of the method's settings (S); its __post_init__ raises ValueError for impossible values."""
    horizon_free: ClassVar[bool] = True
    """The first blocks do not depend on how long the rollout will be, so shorter durations are prefixes."""
    max_frames: ClassVar[int | None] = None
    """Longest possible rollout in latent frames (absolute indices end with the table of rotations), or None."""
    temporal_indices: ClassVar[int] = MAX_INDEX
    """Rows of the table of temporal rotations: indices run from 0 to this minus 1. The generators were released with
    1024; a method that may count further asks for more."""
    as_released: ClassVar[Mapping[str, Any]] = {}
    """Settings that the run preset ``as_released`` puts in place of the defaults: what the released code does at any
    budget."""
    released: ClassVar[Mapping[str, Any]] = {}
    """Settings that a method's preset ``released`` puts in place of the defaults: those of its release, whatever budget
    they spend. Defaults spend the same one for every method."""
    origin: ClassVar[Origin] = Origin()
    """Family, paper, and licence of the released code."""
    restrictions: ClassVar[Sequence[str]] = ()
    """What settings and rollouts must keep to besides `max_frames`, in a few words each; `check` holds them to it."""
    loop: ClassVar[str] = "blocks"
    """Rollout loop that the method is made for: a name in `rollout.loops`, or ``package.module:Loop``."""
    observes_queries: bool = False
    """Call `observe_queries` in every pass; asked at the beginning of each block."""

    @classmethod
    def check(cls, settings: S, frames_per_block: int) -> None:
        """Raise ValueError where a rollout in blocks of `frames_per_block` latent frames cannot be computed."""

    @classmethod
    def check_model(cls, settings: S, layers: int, heads: int, tokens_per_frame: int) -> None:
        """Raise ValueError where the settings do not fit a generator of these sizes."""

    @classmethod
    def check_sampler(cls, settings: S, sampler: SamplerConfig) -> None:
        """Raise ValueError where a rollout with this sampler cannot be computed; mostly a matter of its blocks."""
        cls.check(settings, sampler.frames_per_block)

    @classmethod
    def check_run(cls, settings: S, frames_per_block: int) -> None:
        """Raise ValueError where it can be computed, but no run can mean it; asked of configurations alone."""

    @classmethod
    def weight_files(cls, settings: S) -> Sequence[WeightFile]:
        """Weights of the method's own, those that these settings do not use included."""
        return ()

    @classmethod
    @abstractmethod
    def attended_frames(cls, settings: S, frames_per_block: int, first_frame: int) -> int:
        """Latent frames attended to by the block that starts at `first_frame`, its own included.

        Where heads differ, those of the heads that attend to most.
        """

    @classmethod
    def history_frames(cls, settings: S, frames_per_block: int, total_frames: int) -> int:
        """Latent frames held by the history bank at the end of a rollout of `total_frames`."""
        return 0

    @classmethod
    def device_bytes(cls, settings: S, frames_per_block: int, total_frames: int, kv_bytes_per_frame: int) -> int:
        """Device memory at the end of a rollout beside the attended frames: weights, retrieved frames, statistics.

        `kv_bytes_per_frame` are the keys and values of one latent frame over all layers, as the history stores them.
        """
        return 0

    @classmethod
    def notes(cls, settings: S, frames_per_block: int) -> Iterable[str]:
        """What a person should know about these settings before a run; shown by ``plan``."""
        return ()

    def __init__(self, settings: S, inputs: PolicyInputs) -> None:
        self.settings = settings
        self.layout = inputs.layout
        self.rope = inputs.rope

    def max_context_rows(self) -> int | None:
        """Most rows that `expose` will ever return, so that buffers are allocated once; None where it is not known.

        Where several blocks are denoised at once: most rows beside one block's.
        """
        return None

    @abstractmethod
    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Make room and choose, once, before the first pass.

        `state` is given when finished latents are replayed: what `block_state` returned for this block.
        """

    @abstractmethod
    def query_indices(self) -> list[int]:
        """Temporal index of each frame of the current block (or blocks), for its queries and its own keys."""

    def own_frames(self) -> list[int]:
        """Which of the block's frames 0 .. n-1 the block itself attends to, ascending; all but in odd settings."""
        return list(range(self.layout.frames_per_block))

    def observe_queries(self, layer: int, q: Tensor, q_rotated: Tensor) -> None:
        """Queries [n·f, H, head_dim] of a pass, before attention; only called if `observes_queries`."""

    def begin_expose(self) -> None:
        """The first layer is about to be exposed: the place to fetch what all layers share."""

    @abstractmethod
    def expose(self, layer: int) -> Exposure | Sequence[Exposure]:
        """Rows to attend to before the current block's own; called once per layer, in the block's first pass.

        Where heads attend to different rows, one exposure per group of heads; every head is in one of them.
        """

    def end_expose(self) -> None:
        """The rows of all layers have been copied: the place to let go of what `begin_expose` fetched."""

    def on_latents(self, latents: Tensor) -> None:
        """Clean latents [n, C, H, W] of the block, before its clean-context pass."""

    def begin_store(self) -> None:
        """The clean-context pass is about to store its first layer; `end_block` marks its end."""

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Unrotated K and V [n·f, H, head_dim] of the block's clean-context pass."""

    def end_block(self) -> None:
        """The clean-context pass was launched, all layers are stored: the place to fetch what the next block needs."""

    @abstractmethod
    def trace(self) -> list[TraceRow]:
        """What the current block attends to, its own frames included, in attention order."""

    def block_state(self) -> dict[str, Tensor]:
        """What `begin_block` needs to replay this block from clean latents alone, as CPU tensors; mostly nothing."""
        return {}

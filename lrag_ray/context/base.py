"""base: the backbones' native cache (Self-Forcing, Causal-Forcing, LongLive). Sink and window, absolute indices.

Notation: window W frames, sink S, n frames per block. A block attends to the first S frames, to the newest past frames
behind them, and to itself, at most W frames in all. Before it begins, the oldest frames behind the sink leave the
cache. Every frame keeps its global frame number as temporal index, so the sink drifts away from the queries as the
rollout grows. The released table of rotations ends at index 1023.

Paper: Self-Forcing, arXiv 2506.08009. Follows the behaviour of thu-ml/Causal-Forcing,
which is that of Self-Forcing and LongLive (Apache-2.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrag_ray.context.frames import FramePolicy, check_window
from lrag_ray.context.policy import Origin
from lrag_ray.wan.rope import MAX_INDEX


@dataclass(frozen=True)
class BaseSettings:
    """Settings of base and of infinity_rope."""

    window: int = 12
    """Latent frames attended to, the current block included; -1 keeps all."""
    sink: int = 1
    """First latent frames, which are never dropped."""

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)


class Base(FramePolicy[BaseSettings]):
    """Keeps the first frames (the sink) and the newest ones; positions count from the start of the video."""

    Settings = BaseSettings
    max_frames: ClassVar[int | None] = MAX_INDEX
    origin = Origin(
        "sink", "Self-Forcing, arXiv 2506.08009", "thu-ml/Causal-Forcing, as in Self-Forcing and LongLive", "Apache-2.0"
    )

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Everything in the cache is attended to, at its global frame number."""
        self.make_room(block)
        cached = list(self.window.frames)
        self.context = self.cached_rows(cached, cached)
        self.current = self.current_rows(self.block_frames())

"""∞-RoPE (Infinity-RoPE): the frames of base, with temporal indices relative to the window.

Notation: window W frames, sink S, n frames per block. Block-relativistic RoPE as released: the frame in cache slot j
has index j and the queries take the last slots, so after the window fills the queries stay at W-n .. W-1 and the sink
at 0 .. S-1, however long the rollout grows.

Training-free on any backbone. Paper: arXiv 2511.20649. Follows the behaviour of yesiltepe-hidir/infinity-rope, which
states no licence.
"""

from __future__ import annotations

from torch import Tensor

from lrag_ray.context.base import BaseSettings
from lrag_ray.context.frames import FramePolicy
from lrag_ray.context.policy import Origin


class InfinityRope(FramePolicy[BaseSettings]):
    """Keeps the first frames (the sink) and the newest ones; positions count within the window."""

    Settings = BaseSettings
    origin = Origin("positions", "Infinity-RoPE, arXiv 2511.20649", "yesiltepe-hidir/infinity-rope", "none stated")

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Everything in the cache is attended to, at its slot number."""
        self.make_room(block)
        cached = list(self.window.frames)
        self.at_slots(self.cached_rows(cached, cached))

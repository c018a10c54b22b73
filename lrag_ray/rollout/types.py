"""What a rollout yields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lrag_ray.context.trace import TraceRow


class BlockResult(NamedTuple):
    """One finished block."""

    block: int
    """Block index, from 0."""
    first_frame: int
    """First latent frame of the block."""
    latents: Tensor
    """Clean latents x0 [B, frames_per_block, C, H, W] on the generator's device."""
    trace: list[list[TraceRow]]
    """Per batch element, the rows attended to, in attention order; call by call where `TraceRow.window` is set."""
    state: list[dict[str, Tensor]]
    """Per batch element, what replay cannot rebuild (empty for most methods; see ContextPolicy.block_state and
    RolloutLoop)."""

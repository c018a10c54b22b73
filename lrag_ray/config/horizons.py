"""Durations in seconds to horizons in latent frames."""

from __future__ import annotations

LATENT_FRAMES_PER_SECOND = 4
"""16 video frames a second, 4 of them per latent frame."""


def latent_frames(duration_s: float, frames_per_block: int) -> int:
    """Latent frames of a video of `duration_s`: round(16 · duration / 4), rounded up to whole blocks, at least one."""
    wanted = round(duration_s * LATENT_FRAMES_PER_SECOND)
    blocks = max(1, -(-wanted // frames_per_block))
    return blocks * frames_per_block

"""Settings of low-rank weights."""

from __future__ import annotations

from pydantic import Field

from lrag_ray.config.section import Address, Section


class LoraConfig(Section):
    """Low-rank weights merged into the transformer at load."""

    path: Address
    """LoRA file (LongLive, PEFT, Diffusers, ComfyUI or kohya), or the folder of one."""
    rank: int | None = Field(default=None, ge=1, le=65_536)
    """Rank of the update; None takes the file's. A file of another rank is refused."""
    alpha: float | None = None
    """Scaling numerator: the update is alpha / rank * B A. None takes that of the file or the
    adapter_config.json beside it, else the rank, so that the scale is 1. A value that contradicts it is refused."""

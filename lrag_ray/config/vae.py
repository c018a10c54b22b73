"""Settings of the video VAE."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lrag_ray.config.section import Address, Section


class VaeConfig(Section):
    """The video VAE; `tiny` is AutoencoderKLWan with a small base width and random weights."""

    kind: Literal["tiny", "wan"] = "wan"
    """Which VAE."""
    path: Address | None = None
    """wan: ``Wan2.1_VAE.pth`` or a Diffusers folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the decoder. bfloat16 is faster and visibly off; float16 has 3 more bits and a smaller range, and a
    decode that leaves it fails. `lrag-ray bench decode` shows what each changes."""
    channels_last: bool = False
    """Keep the channels of a pixel side by side, as tensor cores read them. Pixels may differ in their last bits, so it
    is part of what a video is."""

    @model_validator(mode="after")
    def _located(self) -> VaeConfig:
        if self.kind == "wan" and self.path is None:
            raise ValueError("kind wan needs path (Wan2.1_VAE.pth or a Diffusers folder)")
        return self

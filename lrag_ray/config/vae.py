"""Settings of the video VAE."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lrag_ray.config.section import Address, Section

COMPUTES = {"dtype": "float32", "channels_last": False, "fused_norm": False}
"""How a VAE computes, whichever it is: settings that videos are recorded with, and what a record without them means."""


class VaeConfig(Section):
    """The video VAE. `tiny` is AutoencoderKLWan with a small base width and random weights; `tiny_world` is a trained
    one that comes with the package, with twice Wan's spatial compression."""

    kind: Literal["tiny", "tiny_world", "wan"] = "wan"
    """Which VAE."""
    path: Address | None = None
    """wan: ``Wan2.1_VAE.pth`` or a Diffusers folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the decoder. bfloat16 is faster and visibly off; float16 has 3 more bits and a smaller range, and a
    decode that leaves it fails. `lrag-ray bench decode` shows what each changes."""
    channels_last: bool = False
    """Keep the channels of a pixel side by side, as tensor cores read them. Pixels may differ in their last bits, so it
    is part of what a video is."""
    fused_norm: bool = False
    """On a GPU, do norm and activation of the decoder in one Triton kernel; needs channels_last. Pixels may differ in
    their last bits, so it is part of what a video is. Off: no GPU has run it yet."""

    @model_validator(mode="after")
    def _located(self) -> VaeConfig:
        if self.kind == "wan" and self.path is None:
            raise ValueError("kind wan needs path (Wan2.1_VAE.pth or a Diffusers folder)")
        if self.kind != "wan" and self.path is not None:
            raise ValueError(
                f"kind {self.kind} comes with its weights and takes no path. For '{self.path}' give kind: wan"
            )
        if self.fused_norm and not self.channels_last:
            raise ValueError("fused_norm reads the channels of a pixel side by side. Fix: set channels_last: true too")
        return self

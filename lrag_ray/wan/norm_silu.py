"""RMS norm over the channels of each pixel and the SiLU behind it, in the decoder of AutoencoderKLWan.

By diffusers' operations, or by one Triton kernel (`vae.fused_norm`), which takes one launch where they take 7 in
float32 and 9 in other types. It computes in float32 and rounds once, where they round after every step.

Legend: B batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrag_ray.wan.kernel_trial import TOLERANCE, has_triton, refusal_of

_TILE = 2048
"""Values that a program holds at a time: as many whole pixels as fit."""


def use(decoder: Any) -> None:
    """Let the kernel compute each norm with SiLU behind it of a VAE's decoder, on devices and for types that take it.

    Elsewhere they are computed as before, to the same bits.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    blocks = [(module, ("norm1", "norm2")) for module in decoder.modules() if isinstance(module, WanResidualBlock)]
    for module, names in (*blocks, (decoder, ("norm_out",))):
        assert isinstance(module.nonlinearity, nn.SiLU)
        for name in names:
            norm = getattr(module, name)
            norm.forward = _NormSilu(norm, norm.forward)
        module.nonlinearity = nn.Identity()


class _NormSilu:
    """`WanRMS_norm.forward`, and SiLU."""

    def __init__(self, module: Any, usual: Any) -> None:
        self._module, self._usual = module, usual

    def __call__(self, x: Tensor) -> Tensor:
        m = self._module
        if x.dtype in TOLERANCE and unused(x.device) is None:
            # Without a bias it is the number 0.
            return fused(x, m.gamma, m.bias if isinstance(m.bias, Tensor) else None)
        return F.silu(self._usual(x))


def fused(x: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of x / |x| · sqrt(C) · gamma + bias, with |x| over the channels of x [B, C, T, H, W]; gamma and bias hold C.

    The result lies in memory with the channels of a pixel side by side; x is copied so where it does not.
    """
    from lrag_ray.wan.norm_silu_kernel import norm_silu_kernel

    x = x.contiguous(memory_format=torch.channels_last_3d)
    out = torch.empty_like(x)
    width = x.shape[1]
    rows, block = x.numel() // width, 1 << (width - 1).bit_length()
    tile = max(1, _TILE // block)
    with torch.cuda.device_of(x):
        norm_silu_kernel[(-(-rows // tile),)](
            x, gamma, gamma if bias is None else bias, out, rows, width, width**0.5, ADDS=bias is not None, ROWS=tile,
            BLOCK=block,
        )  # fmt: skip
    return out


def unused(device: torch.device) -> str | None:
    """Why decoders on this device do without the kernel, in words; None where they use it."""
    return refusal(device) if has_triton(device) else "it runs on GPUs alone"


def notes(fused_norm: bool, device: torch.device) -> list[str]:
    """Why the kernel is not used, where it was asked for."""
    reason = unused(device) if fused_norm else None
    return [] if reason is None else [f"plain operations in place of vae.fused_norm: {reason}"]


@cache
def refusal(device: torch.device) -> str | None:
    """Why this device does not take the kernel, in words; None where it does. Compiles it and compares a few pixels."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    def trial(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        for channels, bias in ((96, False), (384, True)):
            norm = WanRMS_norm(channels, images=False, bias=bias).requires_grad_(False)
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
            norm = norm.to(device, dtype)
            x = torch.randn(1, channels, 2, 3, 5, generator=draw).to(device, dtype)
            yield fused(x, norm.gamma, norm.bias if bias else None), F.silu(norm(x))

    return refusal_of(trial, tuple(TOLERANCE))

"""What lies between the matrix products of a layer: gated residual, layer norm and modulation, in place.

By torch's operations, or by one Triton kernel (`engine.fused_layers`), which takes 4 launches per layer and pass where
they take 12. It rounds where they round, but sums a row in another order: a value may be the neighbouring one of its
type. On a GPU, GELU is then computed where its matrix product ends. `VERSION` is part of the device kind.

Legend: B batch, F latent frames of the block, L tokens of all of them, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lrag_ray.wan.kernel_trial import has_triton, refusal_of
from lrag_ray.wan.kernels import Kernels

VERSION = 1
"""Of the kernel's numerics."""


def plain(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Add y · gate to x [B, L, D] in place; the norm of the sum · scale + shift, or x itself without a norm.

    `gate`, `shift` and `scale` are [B, F, 1, D], one per latent frame; y is overwritten.
    """
    if y is not None:
        if gate is not None:
            y.unflatten(1, (gate.shape[1], -1)).mul_(gate)
        x += y
    if norm is None:
        return x
    normed: Tensor = norm(x)
    if shift is not None and scale is not None:
        normed.unflatten(1, (shift.shape[1], -1)).mul_(scale).add_(shift)
    return normed


def fused(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """`plain` in one kernel; x is contiguous, and y stays as it is."""
    from lrag_ray.wan.residual_kernel import residual_norm_kernel

    assert x.is_contiguous()
    modulates = shift is not None
    if norm is not None and not modulates:
        shift, scale = norm.bias, norm.weight
    per_frame = [each for each in (gate, shift, scale) if each is not None and each.dim() == 4]
    frames = per_frame[0].shape[1] if per_frame else 1
    assert all(len(x) == 1 or each.stride(0) == frames * each.stride(1) for each in per_frame)
    strides = [each.stride(1) if each is not None and each.dim() == 4 else 0 for each in (gate, shift, scale)]
    out = x if norm is None else torch.empty_like(x)
    batch, rows, width = x.shape
    unused = x
    with torch.cuda.device_of(x):
        residual_norm_kernel[(batch * rows,)](
            x, unused if y is None else y.contiguous(), unused if gate is None else gate,
            unused if shift is None else shift, unused if scale is None else scale, out, rows // frames, width,
            *strides, 0.0 if norm is None else norm.eps, ADDS=y is not None, GATES=gate is not None,
            NORMS=norm is not None, MODULATES=modulates, BLOCK=1 << (width - 1).bit_length(),
        )  # fmt: skip
    return out


def feed_forward(x: Tensor, ffn: nn.Sequential, *, fuses: bool) -> Tensor:
    """Linear, GELU (tanh) and linear; with `fuses`, a GPU computes GELU in the first product's kernel."""
    first = ffn[0]
    if not (fuses and x.is_cuda and isinstance(first, nn.Linear)):
        return ffn(x)
    hidden = torch.ops.aten._addmm_activation.default(first.bias, x.flatten(0, 1), first.weight.t(), use_gelu=True)
    return ffn[2](hidden).view(x.shape)


def fuses(kernels: Kernels, device: torch.device) -> bool:
    """Whether generators on this device use the kernel."""
    return kernels.fused_layers and has_triton(device) and refusal(device) is None


def notes(kernels: Kernels, device: torch.device) -> list[str]:
    """Why the kernel is not used, where it was asked for."""
    if not kernels.fused_layers or fuses(kernels, device):
        return []
    reason = refusal(device) if has_triton(device) else "it runs on GPUs alone"
    return [f"plain operations in place of engine.fused_layers: {reason}"]


@cache
def refusal(device: torch.device) -> str | None:
    """Why this device does not take the kernel, in words; None where it does. Compiles it and compares a few rows."""

    def trial(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(device, dtype)

        x, y, time = drawn(2, 6, 48), drawn(2, 6, 48), drawn(2, 3, 6, 48)
        gate, shift, scale, *_ = time.chunk(6, dim=2)
        affine = nn.LayerNorm(48, 1e-6).to(device, dtype).requires_grad_(False)
        affine.weight.copy_(drawn(48))
        bare = nn.LayerNorm(48, 1e-6, elementwise_affine=False)
        steps: list[tuple[Any, ...]] = [
            (None, None, bare, shift, scale),
            (y, gate, affine),
            (y, None, bare, shift, scale),
            (y, gate),
        ]
        for wanted in steps:
            ours, theirs = x.clone(), x.clone()
            added, *rest = wanted
            yield fused(ours, added, *rest), plain(theirs, None if added is None else added.clone(), *rest)
            yield ours, theirs
        ffn = nn.Sequential(nn.Linear(48, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 48)).to(device, dtype)
        with torch.no_grad():
            for parameter in ffn.parameters():
                parameter.copy_(drawn(*parameter.shape))
            yield feed_forward(x, ffn, fuses=True), feed_forward(x, ffn, fuses=False)

    return refusal_of(trial)

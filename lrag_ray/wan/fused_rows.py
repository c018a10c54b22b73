"""Query/key norm, rotation and the write into the context buffer in one kernel, where the device has Triton.

The arithmetic is that of `transformer.RMSNorm` and `rope.rotate`, each rounded where they round, but the squares of a
row are summed in another order: a value may be the neighbouring one of its type. `VERSION` is part of the device kind.
Whether a device takes the kernel is tried once, on a few rows against the plain operations (`refusal`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from lrag_ray.wan.kernel_trial import has_triton, refusal_of
from lrag_ray.wan.kernels import Kernels
from lrag_ray.wan.rope import Angles, rotate
from lrag_ray.wan.transformer import Projected, RMSNorm

VERSION = 1
"""Of the kernel's numerics."""


def fuses(kernels: Kernels, device: torch.device) -> bool:
    """Whether rollouts on this device use the kernel."""
    return kernels.fused_rows and has_triton(device) and refusal(device) is None


def notes(kernels: Kernels, device: torch.device) -> list[str]:
    """Why the kernel is not used, where it was meant to be."""
    reason = refusal(device) if kernels.fused_rows and has_triton(device) else None
    return [] if reason is None else [f"plain operations in place of the fused kernel, which is slower: {reason}"]


def write_rows(
    projected: Projected, angles: Angles, k_out: Tensor, v_out: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Write the rotated keys and the values of `projected` [B, L, D] to `k_out` and `v_out` [B, L, H, d].

    Returns the rotated queries [B, L, H, d] and, with `keep`, the normed keys before rotation, of the same shape. Rows
    of the outputs lie behind one another; only batch elements may be apart.
    """
    from lrag_ray.wan.fused_kernel import rows_kernel

    q, k, v = (x.contiguous() for x in projected[:3])
    norm_q, norm_k = projected.norm_q, projected.norm_k
    batch, rows, width = q.shape
    head_dim = k_out.shape[-1]
    assert k_out.stride()[1:] == v_out.stride()[1:] == (width, head_dim, 1) and k_out.stride(0) == v_out.stride(0)
    turns = torch.view_as_real(angles.turns).contiguous()
    q_out, kept = torch.empty_like(q), torch.empty_like(k) if keep else k
    block = 1 << (width // 2 - 1).bit_length()
    stride = turns[0].numel() // 2 if turns.dim() == 5 else 0
    with torch.cuda.device_of(q):
        rows_kernel[(rows, batch)](
            q, k, v, norm_q.weight, norm_k.weight, turns, q_out, k_out, v_out, kept, rows, width, head_dim // 2,
            stride, k_out.stride(0), norm_q.eps, KEEP=keep, BLOCK=block,
        )  # fmt: skip
    return q_out.view(k_out.shape), kept.view(k_out.shape) if keep else None


@cache
def refusal(device: torch.device) -> str | None:
    """Why this device does not take the kernel, in words; None where it does. Compiles it and compares a few rows."""

    def trial(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 2, 6, 48, generator=draw).to(device, dtype)
        norms = RMSNorm(48, 1e-6), RMSNorm(48, 1e-6)
        for norm in norms:
            norm.weight = torch.nn.Parameter(torch.rand(48, generator=draw).to(device, dtype), requires_grad=False)
        projected = Projected(q, k, v, *norms, heads=3)
        angles = Angles(torch.polar(torch.ones(6, 1, 8), torch.rand(6, 1, 8, generator=draw)).to(device))
        k_out, v_out = torch.zeros(2, 2, 9, 3, 16, dtype=dtype, device=device)[:, :, 3:]
        turned, kept = write_rows(projected, angles, k_out, v_out, keep=True)
        assert kept is not None
        plain_k, plain_v = projected.keys_values()
        yield from ((turned, rotate(projected.queries(), angles)), (k_out, rotate(plain_k, angles)))
        yield from ((kept, plain_k), (v_out, plain_v))

    return refusal_of(trial)

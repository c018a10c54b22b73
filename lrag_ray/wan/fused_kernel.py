"""The Triton kernel behind `wan.fused_rows`: query/key norm, rotation and the write into the context buffer at once.

One program does one token of one batch element: it reads the projections q, k and v of the token once and writes the
rotated q, and the rotated k and v into the buffer. Without it these are six kernels that each read and write every
row again. Legend: D model width, `pairs` = head_dim / 2.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def rows_kernel(
    q,
    k,
    v,
    q_scale,
    k_scale,
    turns,
    q_out,
    k_out,
    v_out,
    k_normed,
    rows,
    width,
    pairs,
    turns_stride,
    out_stride,
    eps,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q, k, v and q_out [B, rows, D], contiguous; turns [B or 1, rows, pairs, 2]; k_out and v_out [B, rows, D] with
    `out_stride` between batch elements; k_normed [B, rows, D], written where KEEP."""
    row, element = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < width // 2
    turn = turns + 2 * (element * turns_stride + row * pairs + pair % pairs)
    cos, sin = tl.load(turn, mask=inside, other=0.0), tl.load(turn + 1, mask=inside, other=0.0)
    source = (element * rows + row) * width + 2 * pair
    place = element * out_stride + row * width + 2 * pair

    even, odd = _normed(q, q_scale, source, 2 * pair, inside, width, eps)
    _write_turned(q_out, source, even, odd, cos, sin, inside)
    even, odd = _normed(k, k_scale, source, 2 * pair, inside, width, eps)
    if KEEP:
        tl.store(k_normed + source, even.to(k_normed.dtype.element_ty), mask=inside)
        tl.store(k_normed + source + 1, odd.to(k_normed.dtype.element_ty), mask=inside)
    _write_turned(k_out, place, even, odd, cos, sin, inside)
    tl.store(v_out + place, tl.load(v + source, mask=inside), mask=inside)
    tl.store(v_out + place + 1, tl.load(v + source + 1, mask=inside), mask=inside)


@triton.jit
def _normed(x, scale, source, channel, inside, width, eps):
    """Even and odd channels in float32, rounded where `transformer.RMSNorm` rounds: before the scale and behind it."""
    even = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x + source + 1, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(even * even + odd * odd, axis=0) / width + eps)
    kind: tl.constexpr = x.dtype.element_ty
    even, odd = (even * factor).to(kind).to(tl.float32), (odd * factor).to(kind).to(tl.float32)
    even *= tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)
    odd *= tl.load(scale + channel + 1, mask=inside, other=0.0).to(tl.float32)
    return even.to(kind).to(tl.float32), odd.to(kind).to(tl.float32)


@triton.jit
def _write_turned(out, place, even, odd, cos, sin, inside):
    """Channel pairs turned, in the type of `out`."""
    tl.store(out + place, (even * cos - odd * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + 1, (even * sin + odd * cos).to(out.dtype.element_ty), mask=inside)

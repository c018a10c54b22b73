"""The Triton kernel behind `wan.residual_norm`: gated residual, layer norm and modulation of a token at once.

One program does one token: it reads each row once and writes the sum and its norm once.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def residual_norm_kernel(
    x,
    y,
    gate,
    shift,
    scale,
    out,
    rows_per_frame,
    width,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    ADDS: tl.constexpr,
    GATES: tl.constexpr,
    NORMS: tl.constexpr,
    MODULATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, y and out [rows, D], contiguous; gate, shift and scale [frames, D] with these strides between frames, 0 where
    all frames have the same."""
    row = tl.program_id(0).to(tl.int64)
    frame, column = row // rows_per_frame, tl.arange(0, BLOCK)
    inside, place = column < width, row * width + column
    kind: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        if GATES:
            factor = tl.load(gate + frame * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
            added = (added * factor).to(kind).to(tl.float32)
        value = (value + added).to(kind).to(tl.float32)
        tl.store(x + place, value.to(kind), mask=inside)
    if NORMS:
        centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
        factor = tl.load(scale + frame * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + frame * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
        # The plain operations are three, and each rounds; a norm with its own scale is one.
        if MODULATES:
            normed = normed.to(kind).to(tl.float32)
        normed *= factor
        if MODULATES:
            normed = normed.to(kind).to(tl.float32)
        tl.store(out + place, (normed + offset).to(kind), mask=inside)

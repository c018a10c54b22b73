"""The Triton kernel behind `wan.fp8`: the scale of a row and its values in e4m3, read once and written once."""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def round_kernel(x, values, scales, width, largest, least, BLOCK: tl.constexpr):
    """x [rows, width], contiguous; values e4m3 of the same shape, scales float32 [rows]. One program does one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, place = column < width, row * width + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(value), axis=0), least), largest)
    tl.store(scales + row, scale)
    tl.store(values + place, tl.div_rn(value, scale).to(values.dtype.element_ty), mask=inside)

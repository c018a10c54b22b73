"""The Triton kernel behind `wan.norm_silu`: RMS norm over the channels of a pixel, and SiLU, read and written once."""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def norm_silu_kernel(
    x, gamma, bias, out, rows, width, gain, ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """x and out [rows, width], contiguous; gamma and, where ADDS, bias [width]. One program does ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    known = channel < width
    inside, place = (row < rows)[:, None] & known[None, :], row[:, None] * width + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    # A length below 1e-12 counts as 1e-12, as in F.normalize.
    factor = tl.rsqrt(tl.maximum(tl.sum(value * value, axis=1), 1e-24)) * gain
    value = value * factor[:, None] * tl.load(gamma + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        value += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=inside)

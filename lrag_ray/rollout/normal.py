"""Standard normal draws that are the same bits on every CPU.

torch.randn uses other instructions, and other bits, under AVX2 than elsewhere. These draws are made of integers and of
the operations that IEEE 754 rounds exactly (+, -, *, /, square root), one at a time, so nothing is left to a processor:

1. Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; ten rounds, as in NumPy) with a
   128-bit key, its counter starting at 1. Each 64-bit output gives two 32-bit integers k, the low half first.
2. u = (k + 1/2) / 2^32, exact in float64.
3. z = the normal quantile of u by algorithm AS 241, PPND7 (Wichura, "The percentage points of the normal distribution",
   Applied Statistics 37, 1988), relative error 1e-7; in float64, and its logarithm by `_log`.
4. z rounded to float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_CENTRE = (59.109374720, 159.29113202, 50.434271938, 3.3871327179)
_CENTRE_BELOW = (67.187563600, 78.757757664, 17.895169469, 1.0)
_TAIL = (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)
_TAIL_BELOW = (0.12021132975, 0.73700164250, 1.0)
"""Coefficients of AS 241, highest power first. With 32-bit integers its third region, u < e^-25, is never entered."""
_LN2 = 0.6931471805599453
_CHUNK = 1 << 14
"""Values at a time: they stay in the cache of a core."""


def standard_normal(count: int, key: bytes) -> NDArray[np.float32]:
    """`count` draws for a key of 16 bytes (big-endian)."""
    stream = np.random.Philox(key=int.from_bytes(key, "big"), counter=0)
    raw = stream.random_raw((count + 1) // 2)
    integers = np.empty(2 * len(raw), dtype=np.float64)
    integers[0::2] = raw & np.uint64(0xFFFFFFFF)
    integers[1::2] = raw >> np.uint64(32)
    draws = np.empty(count, dtype=np.float32)
    for start in range(0, count, _CHUNK):
        chunk = integers[start : min(start + _CHUNK, count)]
        draws[start : start + len(chunk)] = quantile((chunk + 0.5) * 2.0**-32)
    return draws


def quantile(u: Array) -> Array:
    """Normal quantile of u [n] in 2^-33 .. 1 - 2^-33."""
    q = u - 0.5
    r = 0.180625 - q * q
    z = q * _ratio(r, _CENTRE, _CENTRE_BELOW)
    (outer,) = np.nonzero(np.abs(q) > 0.425)
    p = u[outer]
    p = np.minimum(p, 1.0 - p)
    tail = _ratio(np.sqrt(-_log(p)) - 1.6, _TAIL, _TAIL_BELOW)
    z[outer] = np.where(q[outer] < 0, -tail, tail)
    return z


def _ratio(x: Array, above: tuple[float, ...], below: tuple[float, ...]) -> Array:
    return _polynomial(x, above) / _polynomial(x, below)


def _polynomial(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Horner's rule; each operation is a call of its own, so that no compiler fuses two."""
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        np.multiply(y, x, out=y)
        np.add(y, coefficient, out=y)
    return y


def _log(x: Array) -> Array:
    """Natural logarithm of positive x to 1e-16: x = m · 2^e with m in 1/2 .. 1, ln m = -2 artanh((1 - m) / (1 + m))."""
    mantissa, exponent = np.frexp(x)
    # Into sqrt(1/2) .. sqrt(2), where the series of artanh converges fast.
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(s * s, tuple(1.0 / k for k in range(21, 0, -2)))
    return 2.0 * s * series + (exponent - small) * _LN2

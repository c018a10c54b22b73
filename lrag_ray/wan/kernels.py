"""Which kernels compute a generator, where there is a choice, and what each can compute. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

Backend = Literal["flash", "cudnn", "efficient", "math"]
AttentionChoice = Literal["auto", "flash", "cudnn", "efficient", "math"]
Products = Literal["exact", "fp8"]
"""Matrix products of the layers: in the backbone's precision, or of 8-bit floats (`wan.fp8`)."""


class Kernels(NamedTuple):
    """What was chosen for a generator when it was loaded; it carries them, and so does its rollouts' context."""

    attention: AttentionChoice = "auto"
    """Kernel of every attention (`wan.attention`); ``auto`` takes the fastest that fits."""
    fused_rows: bool = True
    """Norm, rotation and write in one kernel, where a device takes it (`wan.fused_rows`)."""
    fused_layers: bool = False
    """Residual, norm and modulation in one kernel, where a device takes it (`wan.residual_norm`)."""


def unfit(backend: Backend, *, on_gpu: bool, dtype: str, head_dim: int) -> str | None:
    """Why no device of this sort computes tensors of this precision and head size with this kernel, or None."""
    half = dtype in ("bfloat16", "float16")
    if not on_gpu:
        return None if backend in ("flash", "math") else "runs on GPUs alone"
    if backend == "math":
        return None
    if backend == "efficient":
        step = 8 if half else 4
        return f"needs a head_dim that is a multiple of {step}, not {head_dim}" if head_dim % step else None
    if not half:
        return f"computes in bfloat16 and float16, not in {dtype}"
    most = 256 if backend == "flash" else 128
    if head_dim % 8 or head_dim > most:
        return f"needs a head_dim that is a multiple of 8 and at most {most}, not {head_dim}"
    return None

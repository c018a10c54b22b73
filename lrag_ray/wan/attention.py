"""Attention as a pure function of tensors, by one of torch's kernels that is chosen once and called directly.

Which kernel computes decides the last bits and the speed. torch chooses anew in every call, by shapes and by switches
of the process; here the choice follows from device, precision and head size alone (`backend_of`), so that it can be
recorded with what it made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lrag_ray.wan.kernels import AttentionChoice, Backend, unfit

_AUTO: tuple[Backend, ...] = ("flash", "efficient", "math")
"""Fastest first. cuDNN is left out: it compiles anew for every shape, and nobody has measured it here."""
_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_ON_GPU: dict[Backend, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash": lambda q, k, v: _aten._scaled_dot_product_flash_attention.default(q, k, v)[0],
    "cudnn": lambda q, k, v: _aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False)[0],
    "efficient": lambda q, k, v: _aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False)[0],
    "math": lambda q, k, v: _aten._scaled_dot_product_attention_math.default(q, k, v)[0],
}
_ON_CPU: dict[Backend, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash": lambda q, k, v: _aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0],
    "math": _ON_GPU["math"],
}


@cache
def backend_of(choice: AttentionChoice, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The kernel that `attention` calls for such tensors. ValueError where the chosen one cannot compute them."""
    why_not: dict[Backend, str] = {}
    candidates: tuple[Backend, ...] = _AUTO if choice == "auto" else (choice,)
    on_gpu, name = device.type == "cuda", str(dtype).removeprefix("torch.")
    for backend in candidates:
        reason = unfit(backend, on_gpu=on_gpu, dtype=name, head_dim=head_dim)
        if reason is None and on_gpu:
            reason = _missing(backend, device, dtype)
        if reason is None:
            return backend
        why_not[backend] = reason
    reasons = "; ".join(f"{backend} attention {reason}" for backend, reason in why_not.items())
    raise ValueError(f"engine.attention {choice}: {reasons}. Fix: engine.attention: auto")


def _missing(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """What this GPU, or this build of torch, lacks."""
    major, minor = torch.cuda.get_device_capability(device)
    if backend != "math" and dtype in _HALF and major < 8:
        return f"needs a GPU of compute capability 8.0, and this one has {major}.{minor}"
    if backend == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "is not part of this build of torch"
    if backend == "cudnn" and not torch.backends.cudnn.is_available():
        return "needs cuDNN, which this build of torch lacks"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, choice: AttentionChoice = "auto", *, ragged: bool = False) -> Tensor:
    """Softmax(q·kᵀ / sqrt(head_dim))·v without a mask.

    q [B, queries, heads, head_dim]; k and v [B, keys, heads, head_dim]; returns the shape of q. `ragged` says that
    calls of this kind come with many shapes: flash computes them where cuDNN, which compiles for each, is chosen.
    """
    backend = backend_of(choice, q.device, q.dtype, q.shape[-1])
    if ragged and backend == "cudnn":
        backend = "flash"
    kernel = (_ON_GPU if q.is_cuda else _ON_CPU)[backend]
    return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

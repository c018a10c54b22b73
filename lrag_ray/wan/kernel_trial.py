"""Whether a device takes one of our Triton kernels: tried once, on a few rows against the plain operations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Largest difference from the plain operations, as a share of the largest value: a few roundings of the type."""


def has_triton(device: torch.device) -> bool:
    """On the CPU only Triton's interpreter does, for tests."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def refusal_of(
    trial: Callable[[torch.dtype], Iterable[tuple[Tensor, Tensor]]],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> str | None:
    """Why a device does not take a kernel, in words; None where it does.

    `trial` gives what the kernel makes in a precision, each with what the plain operations make.
    """
    for dtype in dtypes:
        try:
            pairs = list(trial(dtype))
        except Exception as error:  # noqa: BLE001 - Triton, compilers and drivers raise what they like
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
        for found, expected in pairs:
            apart = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            if not apart <= TOLERANCE[dtype]:
                return f"it is {apart:.1e} off in {str(dtype).removeprefix('torch.')}"
    return None

"""GPUs that the backbones run on: dense peak arithmetic and memory, from the makers' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple, get_args

import torch

from lrag_ray.wan import fused_rows, residual_norm
from lrag_ray.wan.attention import backend_of
from lrag_ray.wan.kernels import Backend, Kernels


class Device(NamedTuple):
    """One kind of GPU."""

    name: str
    """As people call it."""
    bf16_tflops: float
    """Dense bfloat16 peak on tensor cores with float32 accumulation, in TFLOP/s (no sparsity)."""
    memory_gb: int
    """Memory in 10^9 bytes; of the larger version where there are two."""


_PASS = re.compile(r", (?P<size>\d+) prompts per pass, row (?P<row>\d+)$")
_OPTIONS = re.compile(r", (fused rows|fused layers|\d+ prompts per pass)\b")
"""Where a kind begins to name what is recorded only where it is used."""
_KERNEL = re.compile(rf"\b({'|'.join(get_args(Backend))}) attention\b")

DEVICES = (
    Device("B200", 2250.0, 180),
    Device("H200", 989.4, 141),
    Device("GH200", 989.4, 96),
    Device("H100 PCIe", 756.0, 80),
    Device("H100", 989.4, 80),
    Device("A100", 312.0, 80),
    Device("L40S", 362.0, 48),
    Device("RTX A6000", 154.8, 48),
    Device("RTX 5090", 209.5, 32),
    Device("RTX 4090", 165.2, 24),
    Device("A10G", 70.0, 24),
    Device("L4", 121.0, 24),
)


def device_kind(device: torch.device) -> str:
    """``cpu`` or the name of a GPU, with the libraries whose kernels decide the last bits of what it computes."""
    if device.type != "cuda":
        return f"cpu, torch {torch.__version__}"
    name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return f"{name}, torch {torch.__version__}, cuDNN {cudnn}"


def generator_kind(kernels: Kernels, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """`device_kind` with the kernels that a generator of this precision and head size is computed by.

    ValueError where the chosen kernel cannot compute it (`attention.backend_of`).
    """
    kind = f"{device_kind(device)}, {backend_of(kernels.attention, device, dtype, head_dim)} attention"
    kind += f", fused rows {fused_rows.VERSION}" if fused_rows.fuses(kernels, device) else ""
    return kind + (f", fused layers {residual_norm.VERSION}" if residual_norm.fuses(kernels, device) else "")


def row_kind(kind: str, row: int, size: int) -> str:
    """The kind of what row `row` of passes over `size` prompts makes; `kind` itself where they hold one.

    A product over another number of rows rounds differently, and a kernel may treat the first rows of a product unlike
    the last. A row does not depend on what the others hold.
    """
    return kind if size == 1 else f"{kind}, {size} prompts per pass, row {row}"


def row_of(kind: str, size: int) -> int:
    """The row that `row_kind` put into `kind`, for passes over `size` prompts; 0 where it was made by others."""
    found = _PASS.search(kind)
    return int(found["row"]) % size if found and int(found["size"]) == size else 0


def without_row(kind: str) -> str:
    """`kind` for all rows of a pass: they take equally long."""
    found = _PASS.search(kind)
    return f"{kind[: found.start()]}, {found['size']} prompts per pass" if found else kind


def shown_kind(kind: str) -> str:
    """`without_row` of `kind` for people: the kernels are those of torch's scaled_dot_product_attention (sdpa)."""
    return _KERNEL.sub(r"sdpa attention (\1 kernel)", without_row(kind))


def kernel_notes(kernels: Kernels, device: torch.device) -> list[str]:
    """Which of the chosen kernels the device does without, and why."""
    return [*fused_rows.notes(kernels, device), *residual_norm.notes(kernels, device)]


def same_kind(recorded: str, own: str) -> bool:
    """Whether parts of the kind `recorded` may be continued on `own`.

    Older versions recorded less (``cpu`` alone, no attention kernel); what they left out is not held against them. But
    no version left out fused kernels and rows of a pass (`row_kind`) that it used, so that part must be the same.
    """
    (recorded, *recorded_options), (own, *own_options) = _split(recorded), _split(own)
    return recorded_options == own_options and (own == recorded or own.startswith(f"{recorded}, "))


def _split(kind: str) -> list[str]:
    """The device with its libraries and attention kernel; and the options that follow, if any."""
    found = _OPTIONS.search(kind)
    return [kind[: found.start()], kind[found.start() :]] if found else [kind]


def gpu_hours(flops: float, device: Device, utilisation: float) -> float:
    """Hours of one GPU for `flops` floating-point operations at a fraction `utilisation` of its peak.

    Raises ValueError unless 0 < utilisation <= 1.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation {utilisation} must be above 0 and at most 1, a fraction of the device's peak")
    return flops / (device.bf16_tflops * 1e12 * utilisation) / 3600

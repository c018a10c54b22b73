"""GPUs that the backbones run on: memory and dense peak arithmetic, from the makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """One kind of GPU."""

    name: str
    """As `torch.cuda.get_device_name` spells the part that tells the kind."""
    bf16_tflops: float
    """Dense bfloat16 peak on tensor cores with float32 accumulation, in TFLOP/s (no sparsity)."""
    memory_gb: float
    """Memory in GB (1e9 bytes)."""


DEVICES = (
    Device("B200", 2250.0, 192.0),
    Device("H200", 989.4, 141.0),
    Device("GH200", 989.4, 96.0),
    Device("H100 PCIe", 756.0, 80.0),
    Device("H100", 989.4, 80.0),
    Device("A100", 312.0, 80.0),
    Device("L40S", 362.0, 48.0),
    Device("RTX A6000", 154.8, 48.0),
    Device("RTX 5090", 209.5, 32.0),
    Device("RTX 4090", 165.2, 24.0),
    Device("A10G", 70.0, 24.0),
    Device("L4", 121.0, 24.0),
)
"""Most specific names first where one contains another."""


def device_named(name: str) -> Device | None:
    """The table's entry for a GPU name as CUDA reports it (``NVIDIA H100 80GB HBM3``), or None for an unknown one."""
    words = name.replace("-", " ").split()
    return next((device for device in DEVICES if set(device.name.split()) <= set(words)), None)


def gpu_hours(flops: float, device: Device, utilisation: float) -> float:
    """Hours of one GPU for `flops` floating-point operations at a fraction `utilisation` of its peak.

    Raises ValueError unless 0 < utilisation <= 1.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation {utilisation} must be above 0 and at most 1, a fraction of the device's peak")
    return flops / (device.bf16_tflops * 1e12 * utilisation) / 3600

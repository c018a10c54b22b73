from __future__ import annotations

import pytest

from lrag_ray.wan.devices import device_named, gpu_hours


@pytest.mark.parametrize(
    ("cuda_name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_cuda_names_are_recognised(cuda_name: str, kind: str) -> None:
    device = device_named(cuda_name)
    assert device is not None
    assert device.name == kind


def test_an_unknown_gpu_is_not_guessed() -> None:
    assert device_named("NVIDIA H1000 Ultra") is None


def test_hours_at_a_stated_utilisation() -> None:
    h100 = device_named("NVIDIA H100 80GB HBM3")
    assert h100 is not None
    # A day's peak at half utilisation takes two days.
    assert gpu_hours(989.4e12 * 86400, h100, 0.5) == pytest.approx(48)
    with pytest.raises(ValueError, match="utilisation 40"):
        gpu_hours(1.0, h100, 40)

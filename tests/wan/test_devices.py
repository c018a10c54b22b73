from __future__ import annotations

import pytest

from lrag_ray.wan.devices import Device, gpu_hours, shown_kind


def test_hours_at_a_stated_utilisation() -> None:
    h100 = Device("H100", 989.4, 80)
    # A day's peak at half utilisation takes two days.
    assert gpu_hours(989.4e12 * 86400, h100, 0.5) == pytest.approx(48)
    with pytest.raises(ValueError, match="utilisation 40"):
        gpu_hours(1.0, h100, 40)


def test_people_read_that_kernels_are_those_of_sdpa() -> None:
    kind = "cpu, torch 2.12.1, flash attention, 2 prompts per pass, row 1"
    assert shown_kind(kind) == "cpu, torch 2.12.1, sdpa attention (flash kernel), 2 prompts per pass"
    assert shown_kind("cpu") == "cpu"

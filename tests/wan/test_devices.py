from __future__ import annotations

import pytest

from lrag_ray.wan.devices import Device, gpu_hours


def test_hours_at_a_stated_utilisation() -> None:
    h100 = Device("H100", 989.4, 80)
    # A day's peak at half utilisation takes two days.
    assert gpu_hours(989.4e12 * 86400, h100, 0.5) == pytest.approx(48)
    with pytest.raises(ValueError, match="utilisation 40"):
        gpu_hours(1.0, h100, 40)

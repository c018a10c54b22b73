"""The flow-matching schedule against its formulas, in numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lrag_ray.wan.schedule import FlowMatchSchedule, add_noise, x0_from_flow


@pytest.mark.parametrize(("shift", "half_way"), [(1.0, 1 / 2), (5.0, 5 / 6), (8.0, 8 / 9)])
def test_the_shift_bends_the_table_towards_noise(shift: float, half_way: float) -> None:
    """sigma = shift·u / (1 + (shift - 1)·u): 1 at the start, shift / (1 + shift) at u = 1/2, and never 0."""
    schedule = FlowMatchSchedule(shift)
    assert len(schedule.sigmas) == len(schedule.timesteps) == 1000
    assert float(schedule.sigmas[0]) == 1.0
    assert float(schedule.sigmas[500]) == pytest.approx(half_way, rel=1e-6)
    assert float(schedule.sigmas[999]) == pytest.approx(0.001 * shift / (1 + 0.001 * (shift - 1)), rel=1e-5)
    assert bool((schedule.sigmas.diff() < 0).all())
    torch.testing.assert_close(schedule.timesteps, 1000 * schedule.sigmas)


def test_the_paper_s_steps_are_warped() -> None:
    """Entry d is replaced by timestep number 1000 - d: 750 stands at u = 3/4, 1000·(15/4) / 4 = 937.5."""
    assert FlowMatchSchedule(5.0).warp([1000, 750, 500, 250]) == pytest.approx([1000, 937.5, 2500 / 3, 625], rel=1e-6)
    assert FlowMatchSchedule(1.0).warp([1000, 750, 1]) == pytest.approx([1000, 750, 1], rel=1e-5)
    assert FlowMatchSchedule(5.0).warp([0]) == [0.0]


def test_a_timestep_stands_for_the_nearest_entry() -> None:
    schedule = FlowMatchSchedule(1.0)
    assert schedule.timesteps[:3].tolist() == [1000.0, 999.0, 998.0]
    t = torch.tensor([1000.0, 999.4, 998.6, 998.4, 2000.0, -3.0])
    assert schedule.timestep_index(t).tolist() == [0, 1, 1, 2, 0, 999]
    assert schedule.timestep_index(torch.tensor([999.5, 998.5])).tolist() == [0, 1], "the first one on a tie"


def test_timestep_zero_is_the_last_sigma_and_not_zero() -> None:
    """So the clean-context pass at t = 0 has sigma 0.005 / 1.004."""
    assert float(FlowMatchSchedule(5.0).sigma(torch.tensor([0.0]))) == pytest.approx(0.005 / 1.004, rel=1e-5)


def test_noise_is_added_and_removed_sample_by_sample() -> None:
    """Given x0 = 6 and noise = 12, the flow is 6; at sigma 5/6 x_t = 6/6 + 12·5/6 = 11, at sigma 1 it is the noise."""
    schedule = FlowMatchSchedule(5.0)
    t = torch.tensor([2500 / 3, 1000.0])
    x0, noise, flow = (torch.full((2, 3, 1, 2), value) for value in (6.0, 12.0, 6.0))
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, torch.tensor([11.0, 12.0]).view(2, 1, 1, 1).expand_as(x0))
    torch.testing.assert_close(schedule.x0_from_flow(flow, x_t, t), x0)
    torch.testing.assert_close(schedule.flow_from_x0(x0, x_t, t), flow)


def test_bfloat16_samples_are_mixed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 500, generator=generator).bfloat16()
    sigma = torch.tensor(0.3)
    exact = [(1 - float(sigma)) * a + float(sigma) * b for a, b in zip(x0.tolist(), noise.tolist(), strict=True)]
    mixed = add_noise(x0, noise, sigma)
    assert mixed.dtype == torch.bfloat16
    # A sum in float32 may round the other way once in a few thousand values; one in bfloat16 does in every third.
    assert int((mixed != torch.tensor(exact, dtype=torch.float64).bfloat16()).sum()) <= 2


def test_the_prediction_is_subtracted_in_float64() -> None:
    """Given x_t - sigma·flow that cancels, the result has all digits that float32 can hold."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(500, generator=generator)
    flow, sigma = x_t * 1.0001, torch.tensor(0.99995)
    exact = [a - float(sigma) * b for a, b in zip(x_t.tolist(), flow.tolist(), strict=True)]
    assert torch.equal(x0_from_flow(flow, x_t, sigma), torch.tensor(exact, dtype=torch.float64).float())


def test_training_weights_are_a_bell_over_the_timesteps() -> None:
    """exp(-2·((t - 500) / 1000)²), lowered to end at 0 and scaled to a mean of 1."""
    schedule = FlowMatchSchedule(5.0)
    bell = [math.exp(-2 * ((t - 500) / 1000) ** 2) for t in schedule.timesteps.tolist()]
    raised = [value - min(bell) for value in bell]
    expected = torch.tensor([1000 * value / sum(raised) for value in raised])
    torch.testing.assert_close(schedule.training_weights, expected, rtol=0, atol=1e-5)
    assert float(schedule.training_weights.min()) == 0.0
    nearest = int((schedule.timesteps - 500).abs().argmin())
    assert float(schedule.training_weight(torch.tensor([500.0]))) == float(schedule.training_weights[nearest])

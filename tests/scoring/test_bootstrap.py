"""Bootstrap intervals: against theory, in coverage, by clusters, and always the same."""

from __future__ import annotations

import math
from statistics import NormalDist, stdev

import numpy as np
import pytest

from lrag_ray.scoring.bootstrap import LEAST_PROMPTS, intervals, prompt_means, sample_noise


def of(values: list[float], weights: list[float] | None = None, resamples: int = 4000) -> tuple[float, float, float]:
    """Mean and interval of one column."""
    found = intervals(np.array(weights or [1.0] * len(values)), np.array(values)[:, None], resamples=resamples)[0]
    assert found.lower is not None and found.upper is not None
    return found.mean, found.lower, found.upper


def test_a_symmetric_sample_gives_the_textbook_interval() -> None:
    """For evenly spaced normal quantiles the bootstrap distribution of the mean is nearly normal."""
    count = 200
    values = [NormalDist(3, 2).inv_cdf((i + 0.5) / count) for i in range(count)]
    mean, lower, upper = of(values, resamples=20_000)
    # The bootstrap's variance divides by n.
    half = 1.959964 * stdev(values) * math.sqrt((count - 1) / count) / math.sqrt(count)
    assert mean == pytest.approx(3)
    assert lower == pytest.approx(3 - half, abs=0.03 * half)
    assert upper == pytest.approx(3 + half, abs=0.03 * half)


def test_a_skewed_sample_gives_a_skewed_interval() -> None:
    """BCa follows the skew: the mean of values with a long right tail is uncertain upwards."""
    values = [-math.log(1 - (i + 0.5) / 40) for i in range(40)]
    mean, lower, upper = of(values)
    assert (upper - mean) > 1.15 * (mean - lower)
    mirrored = of([-value for value in values])
    assert mirrored[1] == pytest.approx(-upper, rel=0.05)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_intervals_cover_what_they_say(draw: str) -> None:
    """600 experiments of 40 prompts in one call: each column is one."""
    generator = np.random.default_rng(5)
    samples = getattr(generator, "standard_" + draw)((40, 600))
    truth = 1.0 if draw == "exponential" else 0.0
    found = intervals(np.ones(40), samples, resamples=1000)
    covered = [i.lower is not None and i.upper is not None and i.lower <= truth <= i.upper for i in found]
    assert 0.90 <= sum(covered) / len(covered) <= 0.97


def test_from_few_prompts_intervals_cover_less() -> None:
    """What the report says of them."""
    for prompts, share in ((8, 0.86), (15, 0.90)):
        samples = np.random.default_rng(6).standard_exponential((prompts, 1000))
        found = intervals(np.ones(prompts), samples, resamples=1000)
        covered = [i.lower is not None and i.upper is not None and i.lower <= 1 <= i.upper for i in found]
        assert sum(covered) / len(covered) == pytest.approx(share, abs=0.03)


def test_prompts_are_the_units_not_samples() -> None:
    """Five equal samples per prompt say no more than one."""
    values = np.random.default_rng(1).standard_normal(12)
    once = {(f"p{i:02d}", 0): 1.0 for i in range(12)}
    often = {(f"p{i:02d}", sample): 1.0 for i in range(12) for sample in range(5)}
    alone = intervals(*prompt_means(once, values[:, None]))[0]
    repeated = intervals(*prompt_means(often, values.repeat(5)[:, None]))[0]
    assert repeated == pytest.approx(alone)
    as_if_independent = intervals(np.ones(60), values.repeat(5)[:, None])[0]
    assert as_if_independent.upper is not None and alone.upper is not None
    assert as_if_independent.upper - as_if_independent.mean < 0.6 * (alone.upper - alone.mean)


def test_the_mean_is_that_of_the_table_also_with_unequal_weights() -> None:
    units = {("a", 0): 15.0, ("a", 1): 15.0, ("b", 0): 3.0}
    values = np.array([[0.2], [0.4], [0.9]])
    weights, per_prompt = prompt_means(units, values)
    assert weights.tolist() == [30, 3]
    assert per_prompt[:, 0] == pytest.approx([0.3, 0.9])
    assert intervals(weights, per_prompt)[0].mean == pytest.approx((15 * 0.2 + 15 * 0.4 + 3 * 0.9) / 33)


def test_the_same_data_give_the_same_interval() -> None:
    values = np.random.default_rng(2).standard_normal((20, 3))
    first = intervals(np.ones(20), values)
    assert intervals(np.ones(20), values) == first
    alone = intervals(np.ones(20), values[:, 1:2])[0]
    assert alone == pytest.approx(first[1]), "columns do not depend on their neighbours"


def test_prompts_that_agree_leave_nothing_uncertain() -> None:
    assert of([0.1] * 9) == pytest.approx((0.1, 0.1, 0.1))
    assert not intervals(np.ones(9), np.zeros((9, 1)))[0].excludes_zero


def test_few_prompts_have_no_interval() -> None:
    few = intervals(np.ones(LEAST_PROMPTS - 1), np.ones((LEAST_PROMPTS - 1, 1)))[0]
    assert (few.mean, few.lower, few.upper, few.excludes_zero) == (1, None, None, False)
    enough = intervals(np.ones(LEAST_PROMPTS), np.arange(1.0, LEAST_PROMPTS + 1)[:, None])[0]
    assert enough.excludes_zero


def test_noise_is_the_deviation_within_prompts() -> None:
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 10.0, ("b", 1): 10.0, ("b", 2): 13.0, ("c", 0): 99.0}
    assert sample_noise(values) == pytest.approx(math.sqrt((1 + 1 + 1 + 1 + 4) / 3))
    assert sample_noise({("a", 0): 1.0, ("b", 0): 3.0}) is None

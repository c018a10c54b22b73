"""Random weights depend on seed and name alone, and keep activations of order 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.random_weights import fill_random


def test_parts_of_a_key_are_kept_apart() -> None:
    def draw(*key: str | int) -> float:
        return float(torch.randn(1, generator=keyed_generator(*key)))

    draws = [draw("ab", "c"), draw("a", "bc"), draw("abc"), draw("ab", "c", 0), draw("ab", "c", 1)]
    assert len(set(draws)) == len(draws)
    assert draw("ab", "c") == draws[0]


def test_a_weight_depends_on_seed_and_name_and_nothing_else() -> None:
    """Given the same layer in a larger module, filled after others and under another global seed, it is the same."""
    alone, beside = nn.ModuleDict({"b": nn.Linear(4, 3)}), nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    fill_random(alone, seed=5)
    torch.manual_seed(123)
    fill_random(beside, seed=5)
    weight, weights = alone.state_dict()["b.weight"], beside.state_dict()
    assert torch.equal(weight, weights["b.weight"])
    assert not torch.equal(weight, weights["a.weight"])
    fill_random(beside, seed=6)
    assert not torch.equal(weight, weights["b.weight"])


def test_scales_follow_the_kind_of_parameter() -> None:
    """Matrices gain / sqrt(fan-in), norm scales around 1, biases and modulations small."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(10_000))
            self.modulation = nn.Parameter(torch.empty(1, 6, 2_000))

    module = nn.ModuleDict({"linear": nn.Linear(400, 300), "conv": nn.Conv2d(16, 200, 5), "norm": Norm()})
    fill_random(module, seed=0, gain=2.0)
    values = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, mean, deviation in [
        ("linear.weight", 0.0, 2 / 20),
        ("conv.weight", 0.0, 2 / 20),
        ("linear.bias", 0.0, 0.1),
        ("norm.weight", 1.0, 0.1),
        ("norm.modulation", 0.0, 0.1),
    ]:
        assert float(values[name].mean()) == pytest.approx(mean, abs=0.02), name
        assert float(values[name].std()) == pytest.approx(deviation, rel=0.15), name

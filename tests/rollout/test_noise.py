"""Keyed noise depends on what it is for, and on nothing else."""

from __future__ import annotations

import torch

from lrag_ray.rollout.noise import KeyedNoise, RecordedNoise

SHAPE = (3, 16, 4, 6)


def test_draws_do_not_depend_on_order_or_global_state() -> None:
    first = KeyedNoise(7, ["a fox"], [0], SHAPE)
    late = first.renoise(5, 2)
    torch.manual_seed(123)
    again = KeyedNoise(7, ["a fox"], [0], SHAPE)
    again.initial(0)
    assert torch.equal(again.renoise(5, 2), late)


def test_every_part_of_the_key_matters() -> None:
    base = KeyedNoise(7, ["a fox"], [0], SHAPE)
    draws = [
        base.initial(0),
        base.initial(1),
        base.renoise(0, 0),
        base.renoise(0, 1),
        KeyedNoise(8, ["a fox"], [0], SHAPE).initial(0),
        KeyedNoise(7, ["a fox."], [0], SHAPE).initial(0),
        KeyedNoise(7, ["a fox"], [1], SHAPE).initial(0),
    ]
    for i, a in enumerate(draws):
        assert abs(float(a.mean())) < 0.2
        assert abs(float(a.std()) - 1) < 0.2
        for b in draws[i + 1 :]:
            assert not torch.equal(a, b)


def test_batch_elements_have_their_own_key() -> None:
    both = KeyedNoise(7, ["a fox", "a street"], [0, 2], SHAPE).initial(4)
    assert torch.equal(both[1], KeyedNoise(7, ["a street"], [2], SHAPE).initial(4)[0])


def test_the_draws_are_pinned() -> None:
    """Changing these changes every video: raise NUMERICS_VERSION with them."""
    draw = KeyedNoise(0, ["a fox"], [0], (1, 1, 1, 4)).initial(0).flatten()
    assert torch.allclose(draw, torch.tensor([1.2234231, -0.5660157, 0.4951395, 1.2263204]), atol=1e-6), draw.tolist()


def test_recorded_noise_is_cut_by_block() -> None:
    noise, renoise = torch.randn(2, 6, 1, 2, 2), torch.randn(2, 1, 2, 3, 1, 2, 2)
    source = RecordedNoise(noise, renoise, 3)
    assert torch.equal(source.initial(1), noise[:, 3:6])
    assert torch.equal(source.renoise(1, 0), renoise[1, 0])

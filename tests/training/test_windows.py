"""Which windows an epoch takes, in which order, and which rollouts are held out."""

from __future__ import annotations

import numpy as np
import pytest

from lrag_ray.training.windows import Rollouts, Window, WindowSampler, in_validation, share_of
from tests.training.small import LENGTH, make_rollouts


def sampler(count: int = 21, batch: int = 4, seed: int = 7) -> WindowSampler:
    return WindowSampler(make_rollouts(count), LENGTH, batch, seed)


def epoch(of: WindowSampler, number: int) -> list[Window]:
    return [window for position in range(of.batches_per_epoch) for window in of.batch(number, position)]


def test_an_epoch_takes_one_window_of_every_training_rollout_and_the_last_batch_what_is_left() -> None:
    found = sampler()
    windows = epoch(found, 0)
    assert sorted(window.rollout for window in windows) == found.training.tolist()
    assert len(found.training) % 4 != 0
    assert [len(found.batch(0, i)) for i in range(found.batches_per_epoch)][-1] == len(found.training) % 4


def test_a_split_smaller_than_a_batch_is_one_smaller_batch() -> None:
    found = sampler(batch=1000)
    assert found.batches_per_epoch == 1
    assert len(found.batch(3, 0)) == len(found.training)


def test_windows_reach_from_the_first_to_the_last_possible_start() -> None:
    found = sampler(batch=100)
    starts = {window.start for number in range(60) for window in epoch(found, number)}
    assert starts == set(range(9 - LENGTH + 1))


def test_every_epoch_has_an_order_and_windows_of_its_own_that_only_the_seed_changes() -> None:
    assert epoch(sampler(), 0) != epoch(sampler(), 1)
    assert epoch(sampler(), 5) == epoch(sampler(), 5)
    assert epoch(sampler(seed=8), 0) != epoch(sampler(), 0)
    order = [window.rollout for window in epoch(sampler(), 0)]
    assert order != sorted(order)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_slices_of_the_workers_make_up_the_batch_in_order(workers: int) -> None:
    batch = sampler().batch(0, 0)
    slices = [share_of(batch, rank, workers) for rank in range(workers)]
    assert [window for share in slices for window in share] == batch
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_a_growing_dataset_never_moves_a_rollout_between_the_splits() -> None:
    keys = [f"rollout {i}" for i in range(4000)]
    before = {key: in_validation(key, 0.1) for key in keys[:1000]}
    after = {key: in_validation(key, 0.1) for key in keys}
    assert before.items() <= after.items()
    assert 0.08 < np.mean(list(after.values())) < 0.12
    # A larger share keeps what a smaller one held out.
    assert all(in_validation(key, 0.3) for key in keys if after[key])
    assert not any(in_validation(key, 0.0) for key in keys)


def test_validation_takes_the_same_windows_every_time_whatever_else_is_there() -> None:
    few, many = sampler(18, seed=1), sampler(30, seed=1)
    windows = [
        {of.rollouts.keys[w.rollout]: w.start for batch in of.validation_batches() for w in batch} for of in (few, many)
    ]
    assert windows[0]
    assert windows[0].items() <= windows[1].items()
    held_out = {few.rollouts.keys[int(at)] for at in np.flatnonzero(few.rollouts.validation)}
    assert set(windows[0]) == held_out


def test_rollouts_of_exactly_a_window_have_one_place() -> None:
    rollouts = Rollouts(["a"], np.array([LENGTH]), np.array([False]))
    assert WindowSampler(rollouts, LENGTH, 4, 0).batch(0, 0) == [Window(0, 0)]

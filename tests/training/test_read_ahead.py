"""Batches read ahead: order, bounds, damage."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrag_ray.training.read_ahead import UnusableWindowError, WindowReader, read_ahead
from lrag_ray.training.windows import Window

BATCHES = [[Window(i, j) for j in range(3)] for i in range(6)]


def value(window: Window) -> Tensor:
    return torch.full((2, 1, 1, 1), float(10 * window.rollout + window.start))


def reader(read: Callable[[Window], Tensor] = value) -> WindowReader:
    def read_into(window: Window, out: Tensor) -> None:
        out.copy_(read(window))

    return WindowReader(read_into, (2, 1, 1, 1), torch.bfloat16, lambda w: f"rollout {w.rollout}")


def test_batches_come_in_order_in_the_dataset_s_precision() -> None:
    with read_ahead(reader(), BATCHES) as batches:
        found = list(batches)
    assert [list(batch.windows) for batch in found] == BATCHES
    for batch in found:
        assert batch.latents.dtype == torch.bfloat16
        assert batch.latents[:, 0, 0, 0, 0].tolist() == [10.0 * w.rollout + w.start for w in batch.windows]
        assert not batch.problems


def test_at_most_the_batches_in_flight_are_read_ahead() -> None:
    """Memory is bounded: while the first batch is in use, only two more are read."""
    read: list[Window] = []
    lock = threading.Lock()

    def note(window: Window) -> Tensor:
        with lock:
            read.append(window)
        return value(window)

    with read_ahead(reader(note), BATCHES, ahead=2) as batches:
        next(batches)
        deadline = threading.Event()
        deadline.wait(0.2)
        assert {window.rollout for window in read} == {0, 1, 2}
    assert len(read) == 9


def test_windows_that_cannot_be_used_are_named_and_the_batch_comes_all_the_same() -> None:
    def broken(window: Window) -> Tensor:
        if window == Window(1, 1):
            raise UnusableWindowError("rollout 1 is damaged")
        if window == Window(2, 0):
            return value(window) * float("nan")
        if window == Window(3, 2):
            return torch.tensor([3e38, 3e38]).view(2, 1, 1, 1)  # finite; the sum is not
        if window == Window(4, 1):
            return torch.tensor([float("inf"), float("-inf")]).view(2, 1, 1, 1)
        return value(window)

    with read_ahead(reader(broken), BATCHES) as batches:
        problems = [list(batch.problems) for batch in batches]
    assert problems == [
        [],
        ["rollout 1 is damaged"],
        ["rollout 2 holds NaN or infinite values"],
        [],
        ["rollout 4 holds NaN or infinite values"],
        [],
    ]


def test_other_errors_of_a_read_are_raised() -> None:
    def refuse(window: Window) -> Tensor:
        raise ConnectionError("the store is away")

    with read_ahead(reader(refuse), BATCHES) as batches, pytest.raises(ConnectionError):
        next(batches)

from __future__ import annotations

import threading
import traceback
from functools import partial

import pytest
import torch

from lrag_ray.stages.rollout.background import BackgroundThread
from tests.waiting import wait_until


def test_calls_are_done_in_order_and_never_more_than_the_depth_are_open() -> None:
    done: list[int] = []
    go = threading.Semaphore(0)
    given: list[int] = []

    def call(number: int) -> None:
        go.acquire()
        done.append(number)

    def give() -> None:
        with BackgroundThread(2) as background:
            for number in range(5):
                background.do(call, number)
                given.append(number)
            background.finish()

    thread = threading.Thread(target=give)
    thread.start()
    for released in range(5):
        # One more is given only when one is done.
        assert len(given) <= released + 2
        go.release()
        wait_until(partial(done.__contains__, released), 120, every_s=0.01)
    thread.join()
    assert done == given == [0, 1, 2, 3, 4]


def test_an_exception_keeps_its_own_traceback_and_ends_what_follows() -> None:
    done: list[str] = []

    def fails() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as caught, BackgroundThread(3) as background:
        background.do(fails)
        background.do(done.append, "after")
        background.finish()
    assert "in fails" in "".join(traceback.format_exception(caught.value))
    assert done == []


def test_what_was_given_is_done_when_the_giver_fails() -> None:
    done: list[str] = []
    with pytest.raises(RuntimeError), BackgroundThread(3) as background:
        background.do(done.append, "a block")
        raise RuntimeError("out of blocks")
    assert done == ["a block"]


def test_it_computes_with_as_many_threads_as_its_maker() -> None:
    before = torch.get_num_threads()
    found: list[int] = []
    try:
        torch.set_num_threads(3)
        with BackgroundThread(1) as background:
            background.do(lambda: found.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert found == [3]

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import Future

import pytest

from lrag_ray.thread_pool import thread_pool


@pytest.mark.parametrize("waits", ["in the block", "at its end"])
def test_ctrl_c_cancels_what_is_queued(waits: str) -> None:
    begun: list[int] = []
    queued = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        queued.wait()
        if number == 0:
            time.sleep(0.1)  # until the main thread waits
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.1)

    futures: list[Future[None]] = []
    with pytest.raises(KeyboardInterrupt), thread_pool(2, "test") as pool:
        futures += [pool.submit(work, number) for number in range(20)]
        queued.set()
        if waits == "in the block":
            futures[0].result()
            time.sleep(5)
    assert len(begun) < 6
    assert len(begun) + sum(future.cancelled() for future in futures) == 20


def test_a_block_that_ends_well_waits_for_its_queue() -> None:
    done: list[int] = []
    with thread_pool(2, "test") as pool:
        for number in range(20):
            pool.submit(done.append, number)
    assert sorted(done) == list(range(20))

"""A thread that decodes, encodes and stores a block while the next one is generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec

import torch

P = ParamSpec("P")


class BackgroundThread:
    """Runs calls one after the other in one thread; at most `depth` of them wait or run, so memory stays bounded.

    An exception of a call is raised, with its own traceback, by the next `do` or by `finish`; later calls are skipped.
    Leaving the context waits for all calls.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._calls: deque[Future[None]] = deque()
        self._broken = False
        # A thread has a thread count of its own, and sums change with it.
        self._thread = ThreadPoolExecutor(1, "background", torch.set_num_threads, (torch.get_num_threads(),))

    def do(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue `call`; waits while `depth` calls are not done."""
        while self._calls and (self._calls[0].done() or len(self._calls) >= self._depth):
            self._calls.popleft().result()
        self._calls.append(self._thread.submit(self._guarded, lambda: call(*args, **kwargs)))

    def finish(self) -> None:
        """Wait until everything is done."""
        while self._calls:
            self._calls.popleft().result()

    def __enter__(self) -> BackgroundThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def _guarded(self, call: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            call()
        except BaseException:
            self._broken = True
            raise

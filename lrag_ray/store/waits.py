"""Reports that a command waits for storage, instead of silence.

Example::

    with reporting_waits(print):
        run_status(RolloutRun("s3://bucket/run"))  # a store that does not answer is named after four seconds
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lrag_ray.store.faults import error_code

TELL_AFTER_S = 4.0
"""An operation that takes longer is reported."""
_TELL_AGAIN_S = 30.0


@dataclass
class Wait:
    """One operation under way."""

    what: str
    began_s: float
    """By the monotonic clock."""
    tries_end_s: float
    """No try begins later, by the same clock."""
    error: str = ""
    """Why the last try failed."""

    def failed(self, error: Exception) -> None:
        """A try failed, and there will be another."""
        self.error = error_code(error) or type(error).__name__

    def text(self, now_s: float) -> str:
        """One line on how long it has taken and how long it may take."""
        left_s = self.tries_end_s - now_s
        error = f", the last try ended with {self.error}" if self.error else ""
        until = f"for up to {left_s:.0f} s more" if left_s > 0 else "until the try that is on ends"
        return f"still waiting to {self.what} after {now_s - self.began_s:.0f} s{error}; it is tried {until}"


_under_way: dict[int, Wait] = {}


@contextmanager
def waiting(what: str, tries_for_s: float) -> Iterator[Wait]:
    """An operation, `what` being its verb and place, for the time of the block."""
    now_s = time.monotonic()
    wait = Wait(what, now_s, now_s + tries_for_s)
    _under_way[id(wait)] = wait
    try:
        yield wait
    finally:
        del _under_way[id(wait)]


@contextmanager
def reporting_waits(tell: Callable[[str], None]) -> Iterator[None]:
    """For the time of the block, `tell` hears of operations of this process that take long, from another thread."""
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(tell, ended), name="storage-waits", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(tell: Callable[[str], None], ended: threading.Event) -> None:
    tell_at_s, seen, looks = 0.0, None, 0
    while not ended.wait(TELL_AFTER_S / 4):
        now_s = time.monotonic()
        # A copy, made in one step: other threads begin and end operations meanwhile.
        oldest = min(list(_under_way.values()), key=lambda wait: wait.began_s, default=None)
        # Counted as well: while this process stood still itself, it did not wait for storage.
        seen, looks = oldest, looks + 1 if oldest is seen else 1
        if oldest is None or looks < 4 or now_s - oldest.began_s < TELL_AFTER_S:
            tell_at_s = 0.0
        elif now_s >= tell_at_s:
            tell_at_s = now_s + _TELL_AGAIN_S
            tell(oldest.text(now_s))

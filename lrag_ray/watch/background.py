"""Listeners that may be slow or fail, such as a logger's server: kept in a thread of their own, away from the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from lrag_ray.config.redaction import redact
from lrag_ray.events import Event, Listener
from lrag_ray.printable import counted

_MOST_WAITING = 100_000
"""Events; a logger that is further behind than that misses some, which is reported."""


class BackgroundListener:
    """Passes events on to `listener` in its own thread; nothing that happens there reaches the run.

    The first error ends the listener and is reported through `warn`, in the thread that calls.
    """

    def __init__(self, name: str, listener: Listener, warn: Callable[[str], None]) -> None:
        self._name = name
        self._listener, self._warn = listener, warn
        self._events: queue.Queue[Event | None] = queue.Queue(_MOST_WAITING)
        self._problem: str | None = None
        self._reported = False
        self._missed = 0
        self._thread = threading.Thread(target=self._work, name=f"watch-{name}", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take an event in; never waits."""
        self._report()
        if self._problem is None:
            try:
                self._events.put_nowait(event)
            except queue.Full:
                self._missed += 1

    def close(self, within_s: float) -> None:
        """Let the listener finish, for this long at most."""
        try:
            self._events.put(None, timeout=within_s)
        except queue.Full:
            self._missed += 1
        self._thread.join(within_s)
        if self._thread.is_alive():
            self._warn(f"{self._name}: it did not finish within {within_s:g} s; what it had not sent is lost")
        elif self._missed:
            self._warn(f"{self._name}: it was too slow and missed {counted(self._missed, 'event')}")
        self._report()

    def _report(self) -> None:
        if self._problem is not None and not self._reported:
            self._reported = True
            self._warn(f"{self._name}: {self._problem}. The run continues without it")

    def _work(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                self._listener(event)
        except Exception as error:  # noqa: BLE001 - libraries of others raise whatever comes; reported by the caller
            self._problem = redact(f"{type(error).__name__}: {error}")

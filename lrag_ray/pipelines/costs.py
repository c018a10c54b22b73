"""What calls of language models have cost, while a stage is at work."""

from __future__ import annotations

import time
from collections.abc import Callable

from lrag_ray.events import Event, Listener, Notice, TaskFinished

EVERY_S = 60.0
"""How often it is reported."""


def with_costs(listener: Listener, spent: Callable[[], str], *, every_s: float = EVERY_S) -> Listener:
    """A listener that passes events on and, every `every_s` at most, adds what `spent` says, if anything."""
    last_s = time.monotonic()

    def report(event: Event) -> None:
        nonlocal last_s
        listener(event)
        if isinstance(event, TaskFinished) and time.monotonic() - last_s >= every_s:
            last_s = time.monotonic()
            if cost := spent():
                listener(Notice(cost))

    return report

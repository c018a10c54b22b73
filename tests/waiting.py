"""Waiting for what other processes and threads bring about."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


def wait_until(
    condition: Callable[[], object], timeout_s: float = 300, *, every_s: float = 0.05, said: Callable[[], str] = str
) -> None:
    """Return as soon as `condition` holds; fail after `timeout_s` with what `said` returns, such as a log."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"it did not happen in {timeout_s:g} s\n{said()}")
        time.sleep(every_s)

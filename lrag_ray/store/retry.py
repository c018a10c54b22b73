"""Bounded retries with exponential backoff and full jitter: one more try never falls on the same moment for all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from lrag_ray.config.schema import StorageSection
from lrag_ray.printable import counted
from lrag_ray.store.faults import is_transient

T = TypeVar("T")

FIRST_PAUSE_S = 0.5
"""Upper end of the first pause; it doubles from one to the next."""
LONGEST_PAUSE_S = 20.0

# Not the process-wide generator: nothing else may depend on how often storage was slow.
_random = random.SystemRandom()


class GivenUpError(Exception):
    """Every try failed with a transient error."""

    def __init__(self, last: Exception, tries: int, seconds: float) -> None:
        super().__init__(f"{counted(tries, 'try', 'tries')} in {seconds:.0f} s")
        self.last = last


def with_retries(
    operation: Callable[[], T], options: StorageSection, failed: Callable[[Exception], None] = lambda _: None
) -> T:
    """Result of `operation`, which must be safe to repeat; `failed` is called before each repetition.

    Tries up to `options.attempts` times and begins none later than `options.retry_for_s` after the first. Raises what
    the operation raises if that is not transient, else GivenUpError.
    """
    began = time.monotonic()
    tries = 1
    while True:
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = _random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1)))
            spent = time.monotonic() - began
            if tries >= options.attempts or spent + pause > options.retry_for_s:
                raise GivenUpError(error, tries, spent) from error
            failed(error)
        time.sleep(pause)
        tries += 1

"""Reports when the head of the Ray cluster no longer answers: Ray itself says nothing until it ends the process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_EVERY_S = 2.0
_MISSED = 2
"""Looks in a row that must fail."""


@contextmanager
def head_watch(address: str, tell: Callable[[str], None]) -> Iterator[None]:
    """For the time of the block, `tell` hears, from another thread, when ``host:port`` falls silent and comes back."""
    ended = threading.Event()
    threading.Thread(target=_watch, args=(address, tell, ended), name="head-watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(address: str, tell: Callable[[str], None], ended: threading.Event) -> None:
    host, _, port = address.rpartition(":")
    missed = 0
    while not ended.wait(LOOK_EVERY_S):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=LOOK_EVERY_S).close()
        except OSError:
            missed += 1
            if missed == _MISSED and not ended.is_set():
                tell(
                    f"the head of the Ray cluster ({address}) does not answer. Where that lasts (a minute, unless the "
                    "cluster says otherwise) Ray ends this process; what is stored stays, and the same command "
                    "continues on a new cluster"
                )
        else:
            if missed >= _MISSED:
                tell(f"the head of the Ray cluster ({address}) answers again")
            missed = 0

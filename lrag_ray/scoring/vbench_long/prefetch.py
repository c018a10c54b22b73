"""Work one step ahead: the next item is made in a thread while the last one is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from lrag_ray.thread_pool import thread_pool

T = TypeVar("T")


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """`items` in order, each made while its predecessor is used, so that two are held.

    Decoding lets go of the interpreter, and a GPU then never waits for it. What `items` raises is raised here in its
    turn; a consumer that stops early waits for the item that is being made.
    """
    with thread_pool(1, "prefetch") as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item

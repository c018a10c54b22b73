"""Threads for work side by side, whose queue ends with the block that uses them.

Example::

    with thread_pool(8, "read") as readers:
        contents = list(readers.map(read, paths))
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def thread_pool(threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that waits for its queue at the end of the block; where the block or the wait ends by an exception (an
    error, Ctrl-C, a generator that is closed), calls that have not begun are cancelled.

    An executor of its own finishes them all, at the latest when the interpreter exits.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise

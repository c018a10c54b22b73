"""Batches of windows, read ahead by a few threads while the model works on the current one.

Memory is bounded by `ahead` batches, whatever the size of the dataset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lrag_ray.thread_pool import thread_pool
from lrag_ray.training.windows import Window

AHEAD = 2
"""Batches in flight beside the one in use."""


class UnusableWindowError(Exception):
    """A window cannot be trained on, and no other try can help; the message names rollout and frames."""


class Batch(NamedTuple):
    """This worker's part of a global batch."""

    windows: Sequence[Window]
    latents: Tensor
    """[b, S, C, H, W] on the CPU, page-locked where a GPU takes them; in the dataset's precision."""
    problems: Sequence[str]
    """What is wrong with windows of this batch, one line each; training stops on any."""


class WindowReader(NamedTuple):
    """How windows are read."""

    read_into: Callable[[Window, Tensor], None]
    """Fills a tensor [S, C, H, W] with a window; UnusableWindowError for damaged ones. Called from several threads."""
    shape: tuple[int, int, int, int]
    """[S, C, H, W] of every window."""
    dtype: torch.dtype
    name: Callable[[Window], str]
    """A window for people: rollout and frames."""


@contextmanager
def read_ahead(
    reader: WindowReader,
    batches: Iterable[Sequence[Window]],
    *,
    threads: int = 4,
    ahead: int = AHEAD,
    pin: bool = False,
) -> Iterator[Iterator[Batch]]:
    """Batches in order, `ahead` of them in flight beside the one in use; errors are raised in their turn."""
    with thread_pool(threads, "windows") as pool:
        flights: deque[tuple[Sequence[Window], Tensor, list[Future[str | None]]]] = deque()
        waiting = iter(batches)

        def launch() -> None:
            for windows in waiting:
                out = torch.empty((len(windows), *reader.shape), dtype=reader.dtype, pin_memory=pin)
                flights.append((windows, out, [pool.submit(_fill, reader, w, out[i]) for i, w in enumerate(windows)]))
                return

        def landed() -> Iterator[Batch]:
            for _ in range(ahead):
                launch()
            while flights:
                launch()
                windows, out, reads = flights.popleft()
                problems = [problem for read in reads if (problem := read.result()) is not None]
                yield Batch(windows, out, problems)

        try:
            yield landed()
        finally:
            for _, _, reads in flights:
                for read in reads:
                    read.cancel()


def _fill(reader: WindowReader, window: Window, out: Tensor) -> str | None:
    """Read a window into `out`; returns what is wrong with it."""
    try:
        reader.read_into(window, out)
    except UnusableWindowError as error:
        return str(error)
    # On the host, beside the model's work: a NaN is named where it came from. A finite sum has finite terms; the rest
    # of the check is for windows whose sum overflows.
    if not bool(torch.isfinite(out.sum(dtype=torch.float32))) and not bool(torch.isfinite(out).all()):
        return f"{reader.name(window)} holds NaN or infinite values"
    return None

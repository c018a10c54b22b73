"""Listeners: a live display on a terminal or in a notebook, plain lines elsewhere, or one JSON object per event.

All write to stderr, except in a notebook.

Example::

    with shown_progress() as progress:
        run(config, progress=progress)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from rich.console import Console
from rich.live import Live

from lrag_ray.cli.live import LiveView
from lrag_ray.cli.notebook import in_notebook, live_in_notebook
from lrag_ray.cli.output import console, write
from lrag_ray.cli.run_view import RunView
from lrag_ray.events import (
    Event,
    Listener,
    StageBegan,
    log_record,
)
from lrag_ray.printable import json_text

ProgressForm = Literal["auto", "log", "json"]

_PLAIN_EVERY_S = 10.0


@contextmanager
def shown_progress(form: ProgressForm = "auto") -> Iterator[Listener]:
    """A listener for the time of the block; `auto` is live on a terminal and in a notebook, and lines elsewhere."""
    if form == "json":
        yield json_lines(partial(write, stderr=True))
    elif form == "auto" and sys.stderr.isatty():
        with _live(console(stderr=True)) as receive:
            yield receive
    elif form == "auto" and in_notebook():
        with live_in_notebook(write) as receive:
            yield receive
    else:
        yield PlainProgress(partial(write, stderr=True))


def json_lines(write: Callable[[str], None]) -> Listener:
    """A listener for other programs: one JSON object per line and event."""
    return lambda event: write(json_text(log_record(event)))


class PlainProgress:
    """Prints a line for what a person should know, and the headline now and then."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._view = RunView()
        self._last_s = clock()

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        line = self._view.take(event)
        if line is not None:
            self._write(line)
        if isinstance(event, StageBegan):
            self._last_s = self._clock()
        elif self._clock() - self._last_s >= _PLAIN_EVERY_S and self._view.stage is not None:
            self._last_s = self._clock()
            self._write(self._view.headline())


@contextmanager
def _live(shown: Console) -> Iterator[Listener]:
    view = RunView()
    # The display draws by itself, so that times continue while no event comes.
    with Live(LiveView(view), console=shown, refresh_per_second=4, transient=True):

        def receive(event: Event) -> None:
            if line := view.take(event):
                shown.print(line)

        yield receive

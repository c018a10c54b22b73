"""Three listeners: a live display on a terminal, plain lines elsewhere, or one JSON object per event. All on stderr.

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

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lrag_ray.cli.output import console, count, duration, natural, write
from lrag_ray.cli.training import losses_table, training_headline
from lrag_ray.events import (
    AttemptFailed,
    Event,
    Listener,
    Notice,
    RunPlanned,
    StageBegan,
    StageEnded,
    TaskYielded,
    WorkerLost,
    log_record,
)
from lrag_ray.printable import json_text
from lrag_ray.stages.spec import StageName
from lrag_ray.store.records import ROLLOUTS
from lrag_ray.watch.tally import Tally

ProgressForm = Literal["auto", "log", "json"]

_PLAIN_EVERY_S = 10.0

STAGE_TITLES: dict[StageName, str] = {
    "connect": "connecting to Ray",
    "refine": "refining prompts",
    "text": "encoding prompts",
    "rollouts": "rollouts",
    "decode": "decoding",
    "scoring": "scoring videos",
    "training": "training",
    "report": "writing the report",
    "dataset": "indexing the latents",
}


class RunView(Tally):
    """The state of a run, and how it is put into words."""

    def take(self, event: Event) -> str | None:
        """Take an event in; returns the line that a person should read at once, if any."""
        self.count(event)
        match event:
            case RunPlanned():
                return (
                    f"{event.uri}: {count(event.commits_done)} of {count(event.commits_total)} results are there, "
                    f"{count(event.rollouts_to_do)} rollouts ({count(event.blocks_to_do)} blocks) to do"
                )
            case Notice():
                return f"{'warning: ' if event.warning else ''}{event.text}"
            case StageEnded():
                return f"{STAGE_TITLES[event.stage]}: done in {duration(event.seconds)}"
            case TaskYielded():
                return f"{event.worker} gave {event.task} back: {event.reason}; it continues elsewhere"
            case AttemptFailed(failure):
                then = "quarantined" if failure.quarantined else "will be retried"
                return f"warning: {failure.task}: {failure.reason} ({then}; {failure.path})"
            case WorkerLost():
                return f"warning: {event.worker} was lost and is replaced: {event.reason}"
        return None

    def headline(self) -> str:
        """One line: stage, how far, how fast, how long."""
        if self.stage is None:
            return ""
        if self.stage == "training" and self.training is not None:
            return training_headline(self.training)
        if self.stage != "rollouts":
            of = f" {count(self.stage_done)}/{count(self.stage_total)}" if self.stage_total > 1 else ""
            return f"{STAGE_TITLES[self.stage]}{of}"
        parts = [
            f"rollouts {count(self.rollouts_done)}/{count(self.rollouts_total)}",
            f"blocks {count(self.blocks_done)}/{count(self.blocks_total)}",
        ]
        if rate := self.blocks_per_s:
            parts.append(f"{rate:.3g} blocks/s")
        if (eta := self.eta_s) is not None:
            parts.append(f"about {duration(eta)} left")
        if self.videos_scored:
            parts.append(f"{count(self.videos_scored)} videos scored")
        if self.failed_attempts:
            parts.append(f"{count(self.failed_attempts)} failed attempts")
        return ", ".join(parts)


@contextmanager
def shown_progress(form: ProgressForm = "auto") -> Iterator[Listener]:
    """A listener for the time of the block; `auto` is live on a terminal and lines elsewhere."""
    if form == "json":
        yield json_lines(partial(write, stderr=True))
    elif form == "auto" and sys.stderr.isatty():
        with _live(console(stderr=True)) as receive:
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
        self._view = RunView(clock)
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
    with Live(get_renderable=lambda: _drawn(view), console=shown, refresh_per_second=4, transient=True):

        def receive(event: Event) -> None:
            if line := view.take(event):
                shown.print(line)

        yield receive


def _drawn(view: RunView) -> RenderableType:
    if view.stage is None:
        return Text()
    total, done = (view.stage_total, view.stage_done)
    if view.stage == "rollouts":
        total, done = view.blocks_total, view.blocks_done
    lines: list[RenderableType] = [Text(view.headline(), style="bold")]
    if total > 1:
        bar = Table.grid()
        bar.add_row(ProgressBar(total=total, completed=min(done, total), width=60))
        lines.append(bar)
    flights = Table.grid(padding=(0, 2))
    for worker, flight in sorted(view.flights.items(), key=lambda item: natural(item[0])):
        unit = "block " if view.stage == "rollouts" else ""
        blocks = f"{unit}{flight.done}/{flight.total}" if flight.total else ""
        where = flight.task.removeprefix(f"{ROLLOUTS}/")
        flights.add_row(Text(worker, style="dim"), Text(where), Text(flight.step), Text(blocks))
    if view.flights:
        lines.append(flights)
    if view.stage == "training" and view.training is not None:
        lines.append(losses_table(view.training))
    return Group(*lines)

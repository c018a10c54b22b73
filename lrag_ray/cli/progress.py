"""Three listeners: a live display on a terminal, plain lines elsewhere, or one JSON object per event. All on stderr.

Example::

    with shown_progress() as progress:
        run(config, progress=progress)
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    StageAdvanced,
    StageBegan,
    StageEnded,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
    TaskYielded,
    TrainingAdvanced,
    WorkerLost,
    as_json,
)
from lrag_ray.printable import json_text
from lrag_ray.stages.spec import StageName
from lrag_ray.store.records import ROLLOUTS

ProgressForm = Literal["auto", "log", "json"]

_RATE_WINDOW_S = 120.0
_PLAIN_EVERY_S = 10.0

STAGE_TITLES: dict[StageName, str] = {
    "connect": "connecting to Ray",
    "text": "encoding prompts",
    "rollouts": "rollouts",
    "decode": "decoding",
    "scoring": "scoring videos",
    "training": "training",
    "report": "writing the report",
    "dataset": "indexing the latents",
}


@dataclass
class _Flight:
    task: str
    step: str = "starting"
    done: int = 0
    total: int = 0


@dataclass
class RunView:
    """The state of a run, built from its events."""

    clock: Callable[[], float] = time.monotonic
    rollouts_total: int = 0
    rollouts_done: int = 0
    blocks_planned: int = 0
    failed_attempts: int = 0
    videos_scored: int = 0
    """Beside the rollouts."""
    stage: StageName | None = None
    stage_done: int = 0
    stage_total: int = 0
    training: TrainingAdvanced | None = None
    """Where a training is."""
    flights: dict[str, _Flight] = field(default_factory=dict)
    """What each worker is at."""
    _blocks_finished: int = 0
    _history: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, event: Event) -> str | None:
        """Take an event in; returns the line that a person should read at once, if any."""
        match event:
            case RunPlanned():
                self.rollouts_total, self.blocks_planned = event.rollouts_to_do, event.blocks_to_do
                return (
                    f"{event.uri}: {count(event.commits_done)} of {count(event.commits_total)} results are there, "
                    f"{count(event.rollouts_to_do)} rollouts ({count(event.blocks_to_do)} blocks) to do"
                )
            case Notice():
                return f"{'warning: ' if event.warning else ''}{event.text}"
            case StageBegan():
                self.stage, self.stage_done, self.stage_total = event.stage, 0, event.total
                self._history.clear()
            case StageAdvanced():
                self.stage_done, self.stage_total = event.done, event.total
            case TrainingAdvanced():
                self.training, self.stage_done, self.stage_total = event, event.step, event.steps
            case StageEnded():
                self.stage = None
                self.flights.clear()
                return f"{STAGE_TITLES[event.stage]}: done in {duration(event.seconds)}"
            case TaskStarted():
                self.flights[event.worker] = _Flight(event.task)
            case TaskAdvanced():
                self.flights[event.worker] = _Flight(event.task, event.step, event.done, event.total)
            case TaskFinished(stage="rollouts"):
                self._blocks_finished += event.result.units
                self.rollouts_done += 1
                self._land(event.task)
            case TaskFinished():
                if event.stage == "scoring":
                    self.videos_scored += event.result.made
                self._land(event.task)
            case TaskYielded():
                self.flights.pop(event.worker, None)
                return f"{event.worker} gave {event.task} back: {event.reason}; it continues elsewhere"
            case AttemptFailed(failure):
                self.failed_attempts += 1
                self._land(failure.task)
                then = "quarantined" if failure.quarantined else "will be retried"
                return f"warning: {failure.task}: {failure.reason} ({then}; {failure.path})"
            case WorkerLost():
                self.flights.pop(event.worker, None)
                return f"warning: {event.worker} was lost and is replaced: {event.reason}"
        self._note_pace()
        return None

    @property
    def blocks_done(self) -> int:
        """Blocks of finished rollouts and of those under way."""
        return self._blocks_finished + sum(flight.done for flight in list(self.flights.values()))

    @property
    def blocks_total(self) -> int:
        """Blocks to generate as planned, or more where stored ones are decoded again."""
        return max(self.blocks_planned, self.blocks_done)

    @property
    def blocks_per_s(self) -> float | None:
        """Over the last two minutes, or None while nothing is known."""
        if len(self._history) < 2:
            return None
        (began, before), (now, after) = self._history[0], self._history[-1]
        return (after - before) / (now - began) if now > began and after > before else None

    @property
    def eta_s(self) -> float | None:
        """Seconds until all rollouts are done at this pace."""
        rate = self.blocks_per_s
        return max(0, self.blocks_total - self.blocks_done) / rate if rate else None

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

    def _land(self, task: str) -> None:
        self.flights = {worker: flight for worker, flight in self.flights.items() if flight.task != task}

    def _note_pace(self) -> None:
        if self.stage != "rollouts":
            return
        now = self.clock()
        self._history.append((now, self.blocks_done))
        while now - self._history[0][0] > _RATE_WINDOW_S:
            self._history.popleft()


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
    return lambda event: write(json_text(as_json(event)))


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

"""How far a start is, counted from its events."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from datetime import datetime

from lrag_ray.events import (
    AttemptFailed,
    Event,
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
)
from lrag_ray.stages.spec import StageName
from lrag_ray.store.records import ROLLOUTS

_RATE_WINDOW_S = 120.0


def cell_of(task: str) -> str:
    """``<backbone>/<method>`` of the title of a rollout's task; the title itself where it is none."""
    parts = task.split("/")
    return "/".join(parts[1:3]) if len(parts) == 4 and parts[0] == ROLLOUTS else task


@dataclass
class Flight:
    """What a worker is at."""

    task: str
    step: str = "starting"
    done: int = 0
    total: int = 0
    node: str = ""
    since_s: float = 0.0
    """When the task began, in seconds since 1970 by the clock of the events."""


@dataclass
class Tally:
    """The state of a start, built from its events."""

    rollouts_total: int = 0
    rollouts_done: int = 0
    rollouts_quarantined: int = 0
    blocks_planned: int = 0
    cells_total: dict[str, int] = field(default_factory=dict)
    """Rollouts to do by ``<backbone>/<method>``."""
    cells_done: Counter[str] = field(default_factory=Counter)
    cells_failed: Counter[str] = field(default_factory=Counter)
    """Quarantined ones."""
    failed_attempts: int = 0
    videos_scored: int = 0
    stored_bytes: int = 0
    """Of finished tasks."""
    stage: StageName | None = None
    stage_done: int = 0
    stage_total: int = 0
    stage_began_s: float = 0.0
    """In seconds since 1970 by the clock of the events."""
    training: TrainingAdvanced | None = None
    """Where a training is."""
    flights: dict[str, Flight] = field(default_factory=dict)
    """By worker."""
    _blocks_finished: int = 0
    _history: deque[tuple[float, int]] = field(default_factory=deque)

    def count(self, event: Event) -> None:
        """Take an event in."""
        match event:
            case RunPlanned():
                self.rollouts_total, self.blocks_planned = event.rollouts_to_do, event.blocks_to_do
                self.cells_total = dict(event.cells)
            case StageBegan():
                self.stage, self.stage_done, self.stage_total = event.stage, 0, event.total
                self.stage_began_s = event.at.timestamp()
                self._history.clear()
            case StageAdvanced():
                self.stage_done, self.stage_total = event.done, event.total
            case TrainingAdvanced():
                self.training, self.stage_done, self.stage_total = event, event.step, event.steps
            case StageEnded():
                self.stage = None
                self.flights.clear()
            case TaskStarted():
                self.flights[event.worker] = Flight(event.task, node=event.node, since_s=event.at.timestamp())
            case TaskAdvanced():
                before = self.flights.get(event.worker) or Flight(event.task, since_s=event.at.timestamp())
                flight = replace(before, task=event.task, step=event.step, done=event.done, total=event.total)
                self.flights[event.worker] = flight
            case TaskFinished():
                self._finish(event)
            case AttemptFailed(failure):
                self.failed_attempts += 1
                if failure.quarantined and failure.stage == "rollouts":
                    self.rollouts_quarantined += 1
                    self.cells_failed[cell_of(failure.task)] += 1
                self._land(failure.task)
            case TaskYielded() | WorkerLost():
                self.flights.pop(event.worker, None)
        self._note_pace(event.at)

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
        """Over the last two minutes by the times of the events, or None while nothing is known."""
        if len(self._history) < 2:
            return None
        (began, before), (now, after) = self._history[0], self._history[-1]
        return (after - before) / (now - began) if now > began and after > before else None

    @property
    def eta_s(self) -> float | None:
        """Seconds until all rollouts are done at this pace."""
        rate = self.blocks_per_s
        return max(0, self.blocks_total - self.blocks_done) / rate if rate else None

    def _finish(self, event: TaskFinished) -> None:
        if event.stage == "rollouts":
            self._blocks_finished += event.result.units
            self.rollouts_done += 1
            self.cells_done[cell_of(event.task)] += 1
        elif event.stage == "scoring":
            self.videos_scored += event.result.made
        self.stored_bytes += event.result.stored_bytes
        self._land(event.task)

    def _land(self, task: str) -> None:
        self.flights = {worker: flight for worker, flight in self.flights.items() if flight.task != task}

    def _note_pace(self, at: datetime) -> None:
        if self.stage != "rollouts":
            return
        now = at.timestamp()
        if self._history and now < self._history[-1][0]:
            # The clock was set back.
            self._history.clear()
        self._history.append((now, self.blocks_done))
        while now - self._history[0][0] > _RATE_WINDOW_S:
            self._history.popleft()

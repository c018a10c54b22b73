"""What a start reports while it works. Terminal, log and JSON are listeners.

Nothing here is needed for correctness: storage is the truth, and a lost event is only a number that is shown late.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from lrag_ray.stages.spec import Result, StageName
from lrag_ray.store.records import FailureRecord


@dataclass(frozen=True)
class _Timed:
    """What all events have."""

    at: datetime = field(default_factory=lambda: datetime.now(UTC), kw_only=True, compare=False)
    """When it happened (UTC), by the clock of the driver; kept where the event is read from a log later."""


@dataclass(frozen=True)
class RunPlanned(_Timed):
    """The run directory was read: what there is to do."""

    uri: str
    commits_total: int
    """Horizons of all rollouts of the configuration."""
    commits_done: int
    rollouts_to_do: int
    blocks_to_do: int
    """Upper bound: what stored parts save is not known yet."""
    cells: Mapping[str, int] = field(default_factory=dict)
    """Rollouts to do by ``<backbone>/<method>``."""


@dataclass(frozen=True)
class Notice(_Timed):
    """Something a person should read."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class StageBegan(_Timed):
    """A stage began, with this many tasks."""

    stage: StageName
    total: int


@dataclass(frozen=True)
class StageAdvanced(_Timed):
    """Tasks of the stage that are finished, quarantined ones included."""

    stage: StageName
    done: int
    total: int


@dataclass(frozen=True)
class StageEnded(_Timed):
    """A stage ended."""

    stage: StageName
    seconds: float


@dataclass(frozen=True)
class TaskStarted(_Timed):
    """An attempt was sent to a worker."""

    stage: StageName
    task: str
    attempt: str
    worker: str
    """Its name; ``+1``, ``+2``, … follow it for further tasks that it is given together with a first one."""
    node: str = ""
    """Ray's id of the worker's node; empty where it is not known."""


@dataclass(frozen=True)
class TaskAdvanced(_Timed):
    """A worker's state, about once a second."""

    stage: StageName
    task: str
    worker: str
    done: int
    """In units of the stage, such as blocks."""
    total: int
    step: str


@dataclass(frozen=True)
class TrainingAdvanced(_Timed):
    """Where a training is, about once a second; the fields of `lrag_ray.training.loop.Progress`."""

    epoch: int
    """The epoch under way, from 1."""
    epochs: int
    step: int
    steps: int
    workers: int
    doing: str
    """loading, training or validating."""
    train: Sequence[float]
    """Means of recon, delta and smooth over the epoch so far; empty before the first step."""
    validation: Sequence[float]
    """The same of the last validation."""
    best: float | None
    """Lowest validation total."""
    best_epoch: int | None
    """Its epoch, from 1."""
    windows_per_s: float | None


@dataclass(frozen=True)
class TaskFinished(_Timed):
    """A task is done."""

    stage: StageName
    task: str
    result: Result


@dataclass(frozen=True)
class TaskYielded(_Timed):
    """A worker had to leave; what it did is stored, and another worker continues from there."""

    stage: StageName
    task: str
    worker: str
    reason: str


@dataclass(frozen=True)
class AttemptFailed(_Timed):
    """An attempt failed; `failure` is what is stored."""

    failure: FailureRecord


@dataclass(frozen=True)
class WorkerLost(_Timed):
    """A worker died and is being replaced."""

    worker: str
    reason: str


@dataclass(frozen=True)
class CellScored(_Timed):
    """Scores of one cell in the report that is written: what its row of the rank table says."""

    backbone: str
    method: str
    duration_s: float
    prompts: int
    """Prompts that the means are over."""
    means: Mapping[str, float]
    """Unrounded mean by dimension."""
    average_rank: float | None
    """None where the method is compared with no other."""


@dataclass(frozen=True)
class ReportWritten(_Timed):
    """The report of a run was written."""

    folder: str
    """Its address as it may be shown."""
    files: tuple[str, ...]
    """Names in it, the page first."""


RunState = Literal["done", "incomplete", "interrupted", "failed"]


@dataclass(frozen=True)
class RunEnded(_Timed):
    """The last event of a start, however it ended."""

    job: str
    uri: str
    state: RunState
    """done: all is made. incomplete: something could not be made. interrupted. failed: an error ended it."""
    exit_code: int
    seconds: float
    missing: int
    """What could not be made."""
    reasons: tuple[str, ...]
    """Title and reason of the first few of them."""
    error: str | None
    """What ended it, where `state` is failed."""


Event = (
    RunPlanned
    | Notice
    | StageBegan
    | StageAdvanced
    | StageEnded
    | TaskStarted
    | TaskAdvanced
    | TrainingAdvanced
    | TaskFinished
    | TaskYielded
    | AttemptFailed
    | WorkerLost
    | CellScored
    | ReportWritten
    | RunEnded
)

Listener = Callable[[Event], None]
"""Receives every event, in the driver's main thread."""


def silent(_: Event) -> None:
    """A listener that shows nothing."""


def log_record(event: Event) -> dict[str, Any]:
    """An event as one record of a structured log: when (UTC), its type under ``event``, then its other fields."""
    fields = event.failure.model_dump(mode="json") if isinstance(event, AttemptFailed) else dataclasses.asdict(event)
    fields.pop("at", None)
    return {"at": event.at.isoformat(timespec="milliseconds"), "event": type(event).__name__, **fields}


def from_json(data: Mapping[str, Any]) -> Event | None:
    """The event that `log_record` made `data` of; None for what is none, or one that another version reports.

    Fields that this version does not know are left out.
    """
    name = data.get("event")
    kind = next((kind for kind in get_args(Event) if kind.__name__ == name), None)
    if kind is None:
        return None
    known = FailureRecord.model_fields if kind is AttemptFailed else {field.name for field in dataclasses.fields(kind)}
    fields: dict[str, Any] = {key: value for key, value in data.items() if key in known}
    if kind is AttemptFailed:
        fields = {"failure": fields}
    if "at" in data:
        fields["at"] = data["at"]
    try:
        event: Event = _adapter(kind).validate_python(fields)
    except ValidationError:
        return None
    return event


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)

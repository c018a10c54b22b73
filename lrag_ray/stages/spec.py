"""The contract between a stage and the engine that runs it.

A stage says in one place what it needs, how it is set up in a worker's process, what it does with one task and what it
returns. The engine runs any stage: on a pool of actors (`lrag_ray.engine.pool`) or through Ray Data
(`lrag_ray.engine.fan_out`). A stage knows nothing of Ray and works in a notebook::

    stage = RolloutStage(...)
    worker = stage.open(LocalHost())
    outcome = worker.work(task.payload, new_attempt_id())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

from lrag_ray.errors import LragError
from lrag_ray.store.records import FailureRecord

Payload = TypeVar("Payload")
PayloadIn = TypeVar("PayloadIn", contravariant=True)

StageName = Literal[
    "connect", "refine", "text", "rollouts", "decode", "scoring", "dataset", "training", "report", "verify"
]  # fmt: skip


class Resources(NamedTuple):
    """What one worker reserves of its node, besides the memory of its tasks."""

    cpus: float = 1
    gpus: float = 0
    """Whole GPUs, or a share of one."""


@dataclass(frozen=True)
class Task(Generic[Payload]):
    """A piece of work of a stage."""

    key: str
    """Unique within the stage."""
    payload: Payload
    """What the worker receives; picklable."""
    order: int = 0
    """Tasks start in this order, except that a worker prefers its own group (see `lrag_ray.engine.queue`)."""
    group: str = ""
    """What a worker must have loaded for it, such as the backbone; switching is expensive."""
    name: str = ""
    """Name in messages and failure records; the key if empty."""
    memory: int = 0
    """Bytes of host memory that its worker must have reserved, also for those that are done with it."""
    progress: int = 0
    """Progress at the start, in the unit of `Stage.progress`."""
    batch: str = ""
    """Tasks of one batch may be done together (`Stage.tasks_at_once`); empty: it is done alone."""

    @property
    def title(self) -> str:
        """How people see it."""
        return self.name or self.key


@dataclass(frozen=True)
class Result:
    """A task is done."""

    made: int = 1
    """Results that count now: commits, videos, scores."""
    units: int = 1
    """Work done, in the unit of the display: blocks of a rollout, otherwise tasks."""
    seconds: float = 0.0
    unit_seconds: float = 0.0
    """Mean time of one unit that was computed, without loading and replaying; 0 where none was."""
    stored_bytes: int = 0
    """Bytes of the files that were stored; 0 where a stage does not count them."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as broken parts that were cut off."""


@dataclass(frozen=True)
class Yielded:
    """The worker must go, such as one on a draining node; what it finished is stored.

    The task is queued again ahead of all others and no attempt is counted.
    """

    reason: str


@dataclass(frozen=True)
class Refused:
    """The task can never be done, for instance because its input is damaged: it fails at once, without a retry."""

    reason: str


Outcome = Result | Yielded | Refused


@dataclass(frozen=True)
class Parted:
    """Of tasks that were to be done together: this one could not be. It is queued again, to be done alone."""

    reason: str


class WorkerState(NamedTuple):
    """What a worker is doing."""

    task: str
    """Title of its task."""
    done: int
    """Units done."""
    total: int
    step: str
    """A word for people: loading, replaying, generating, storing, …"""


class Host(Protocol):
    """What a worker may ask of the place where it runs."""

    @property
    def name(self) -> str:
        """Name of the worker."""

    def must_leave(self) -> bool:
        """Whether to store what is finished and return `Yielded`: the node drains, or the stage must stop."""

    def report(self, state: WorkerState) -> None:
        """Report a step. Costs next to nothing and is a sign of life."""


class LocalHost:
    """A host outside the engine: for notebooks and tests."""

    name = "local"

    def __init__(
        self,
        report: Callable[[WorkerState], None] = lambda _: None,
        must_leave: Callable[[], bool] = lambda: False,
    ) -> None:
        self.report = report
        self.must_leave = must_leave


class Worker(Protocol[PayloadIn]):
    """A stage set up in a process. Does one task at a time."""

    def work(self, payload: PayloadIn, attempt: str) -> Outcome:
        """Do a task. An exception is a failed attempt, which is retried within limits."""


class BatchWorker(Worker[PayloadIn], Protocol[PayloadIn]):
    """A worker of a stage with `tasks_at_once`."""

    def work_together(self, payloads: Sequence[PayloadIn], attempts: Sequence[str]) -> Sequence[Outcome | Parted]:
        """Do tasks of one batch; an outcome for each. An exception is a failed attempt of all, and not counted where
        there are several: each is then retried alone."""


class Stage(ABC, Generic[Payload]):
    """What a worker does, as a picklable object."""

    name: ClassVar[StageName]
    """Name in events and failure records."""
    fatal: ClassVar[tuple[type[LragError], ...]] = ()
    """Errors of a task that end the whole stage, because every other task would meet them too."""
    memory_use: ClassVar[str] = "this task"
    """What the memory of a task is needed for, in messages."""

    @property
    @abstractmethod
    def resources(self) -> Resources:
        """What each worker reserves."""

    @property
    def tasks_at_once(self) -> int:
        """Most tasks of one batch that a worker is given together; above 1 the workers are `BatchWorker`."""
        return 1

    @abstractmethod
    def open(self, host: Host) -> Worker[Payload]:
        """Set up in a worker's process. An exception here means that no worker can start."""

    def progress(self, task: Task[Payload]) -> int:
        """How far a task is on storage, in any unit that grows. Called in the driver after an attempt failed.

        A death that brought progress does not count as an attempt. Raises StorageError where it cannot be read.
        """
        return 0

    def ends_with(self, failure: FailureRecord) -> LragError | None:
        """After a task was quarantined: an error that ends the whole stage, or None to go on with the other tasks."""
        return None

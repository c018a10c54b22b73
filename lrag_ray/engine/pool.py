"""An explicit pool of Ray actors: one item in flight each, deaths survived, poison put aside.

Ray is asked to restart and retry nothing (`max_restarts=0`, `max_task_retries=0`): this loop replaces actors and counts
attempts, because only it can tell a rollout that raises (which counts) from a worker that was taken away (which counts
only when three in a row brought nothing forward). Actors that cannot be placed yet stay pending, which is the demand
that makes a cluster scale up. What an item is, and what is done with it, the pool does not know.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from lrag_ray.errors import ClusterError
from lrag_ray.store.address import redact
from lrag_ray.store.run_dir import new_attempt_id

WORKER_LOST = (ActorDiedError, ActorUnavailableError, NodeDiedError, WorkerCrashedError, ObjectLostError)
"""The worker or its node went away, or the answer was lost with it. Ray has no common base for these."""

BARREN_DEATHS = 3
"""A death counts as an attempt from this many on that in a row brought nothing forward."""

_POLL_S = 0.25
_START_FAILURES = 3
_UNPLACED_S = 30.0
_REASON_CHARACTERS = 500
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")

Payload = TypeVar("Payload")
Result = TypeVar("Result")
ResultIn = TypeVar("ResultIn", contravariant=True)
FailureKind = Literal["exception", "death", "out_of_memory"]


@dataclass(frozen=True)
class WorkItem(Generic[Payload]):
    """A piece of work."""

    key: str
    """Unique name."""
    order: int
    """Items are begun in this order, but see `AFFINITY_SPAN`."""
    group: str
    """What a worker must hold for it (the backbone); changing it is expensive."""
    payload: Payload
    progress: int = 0
    """How far it is already, in the unit of `PoolListener.progress_of`."""


AFFINITY_SPAN = 4
"""A worker prefers items of the group it holds up to so many orders ahead of the earliest item that waits."""


@dataclass(frozen=True)
class AttemptFailure:
    """Why an attempt ended without a result."""

    kind: FailureKind
    counted: bool
    counted_attempts: int
    quarantined: bool
    reason: str
    traceback: str


class PoolListener(Protocol[Payload, ResultIn]):
    """Told what happens, in the driver."""

    def started(self, item: WorkItem[Payload], attempt: str, worker: str) -> None:
        """An attempt was sent to a worker."""

    def finished(self, item: WorkItem[Payload], result: ResultIn) -> None:
        """An item is done."""

    def failed(self, item: WorkItem[Payload], attempt: str, failure: AttemptFailure) -> None:
        """An attempt failed; the item is tried again unless `failure.quarantined`."""

    def worker_lost(self, worker: str, reason: str) -> None:
        """A worker died and will be replaced."""

    def unplaced(self, seconds: float) -> None:
        """For so long no worker could start; told once."""

    def progress_of(self, item: WorkItem[Payload]) -> int:
        """How far the item is on storage, in any unit that grows."""

    def tick(self) -> None:
        """Called a few times a second."""


@dataclass
class _Worker:
    name: str
    actor: Any
    ready: bool = False
    group: str | None = None


@dataclass
class _Flight(Generic[Payload]):
    worker: _Worker
    item: WorkItem[Payload] | None
    """None while the worker starts."""
    attempt: str = ""


@dataclass
class _Record:
    counted: int = 0
    barren_deaths: int = 0
    progress: int = 0


@dataclass
class ActorPool(Generic[Payload, Result]):
    """Runs items on up to `size` actors until each is finished or quarantined.

    An actor has a method ``ready()``, which returns when it can work, and is given items by `submit`.
    """

    spawn: Callable[[str], Any]
    """Makes an actor handle for a worker of that name; max_restarts and max_task_retries must be 0."""
    submit: Callable[[Any, Payload, str], Any]
    """Sends a payload and the attempt's id to an actor; returns the object reference of the result."""
    listener: PoolListener[Payload, Result]
    size: int
    max_attempts: int
    _workers: list[_Worker] = field(default_factory=list, init=False)
    _flights: dict[Any, _Flight[Payload]] = field(default_factory=dict, init=False)
    _records: dict[str, _Record] = field(default_factory=dict, init=False)
    _spawned: int = field(default=0, init=False)
    _failed_starts: int = field(default=0, init=False)

    def run(self, items: Sequence[WorkItem[Payload]]) -> list[WorkItem[Payload]]:
        """Work through `items`; returns those that were quarantined.

        Raises ClusterError when three workers in a row die before they are ready. The actors are gone afterwards,
        whatever happens.
        """
        self._waiting = sorted(items, key=lambda item: item.order)
        self._records = {item.key: _Record(progress=item.progress) for item in items}
        quarantined: list[WorkItem[Payload]] = []
        self._tell_unplaced_at = time.monotonic() + _UNPLACED_S
        try:
            while self._waiting or any(flight.item is not None for flight in self._flights.values()):
                self._spawn_missing()
                self._assign()
                done, _ = ray.wait(list(self._flights), num_returns=1, timeout=_POLL_S)
                for ref in done:
                    item = self._settle(ref)
                    if item is not None:
                        quarantined.append(item)
                self._watch_placement()
                self.listener.tick()
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)
            self._workers.clear()
            self._flights.clear()
        return quarantined

    def _spawn_missing(self) -> None:
        busy = sum(flight.item is not None for flight in self._flights.values())
        while len(self._workers) < min(self.size, busy + len(self._waiting)):
            name = f"worker-{self._spawned}"
            self._spawned += 1
            worker = _Worker(name, self.spawn(name))
            self._workers.append(worker)
            self._flights[worker.actor.ready.remote()] = _Flight(worker, None)

    def _watch_placement(self) -> None:
        now = time.monotonic()
        if any(worker.ready for worker in self._workers):
            self._tell_unplaced_at = now + _UNPLACED_S
        elif now >= self._tell_unplaced_at:
            self._tell_unplaced_at = math.inf
            self.listener.unplaced(_UNPLACED_S)

    def _assign(self) -> None:
        flying = {id(flight.worker) for flight in self._flights.values()}
        for worker in self._workers:
            if self._waiting and worker.ready and id(worker) not in flying:
                item = self._next_for(worker)
                worker.group = item.group
                attempt = new_attempt_id()
                self._flights[self.submit(worker.actor, item.payload, attempt)] = _Flight(worker, item, attempt)
                self.listener.started(item, attempt, worker.name)

    def _next_for(self, worker: _Worker) -> WorkItem[Payload]:
        """The earliest item, or one slightly later of the group that the worker holds (or that fewest others hold)."""
        last = self._waiting[0].order + AFFINITY_SPAN
        first_of_group: dict[str, int] = {}
        for position, item in enumerate(self._waiting):
            if item.order > last:
                break
            first_of_group.setdefault(item.group, position)
        if worker.group in first_of_group:
            return self._waiting.pop(first_of_group[worker.group])
        holders = Counter(other.group for other in self._workers if other is not worker)
        group = min(first_of_group, key=lambda name: (holders[name], first_of_group[name]))
        return self._waiting.pop(first_of_group[group])

    def _settle(self, ref: Any) -> WorkItem[Payload] | None:
        """Take in what a finished reference says; returns the item if it is now quarantined."""
        flight = self._flights.pop(ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            if flight.item is None:
                self._lose(flight.worker, error)
                self._start_failed(error)
                return None
            return self._failed(flight.item, flight.attempt, _kind_of(error), error)
        except (*WORKER_LOST, OutOfMemoryError) as error:
            self._lose(flight.worker, error)
            if flight.item is None:
                self._start_failed(error)
                return None
            kind: FailureKind = "out_of_memory" if _is_out_of_memory(error) else "death"
            return self._failed(flight.item, flight.attempt, kind, error)
        if flight.item is None:
            flight.worker.ready = True
            self._failed_starts = 0
        else:
            self.listener.finished(flight.item, result)
        return None

    def _lose(self, worker: _Worker, error: Exception) -> None:
        # An unavailable actor may come back and go on; it is replaced, so it must not.
        ray.kill(worker.actor)
        self._workers.remove(worker)
        self.listener.worker_lost(worker.name, _first_line(error))

    def _start_failed(self, error: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _START_FAILURES:
            raise ClusterError(
                f"{_START_FAILURES} workers in a row died before they were ready; the last: {_first_line(error)}. "
                "Check that the nodes have the same environment as this one and room for engine.cpus_per_actor and "
                "engine.gpus_per_actor"
            ) from error
        time.sleep(_POLL_S)

    def _failed(
        self,
        item: WorkItem[Payload],
        attempt: str,
        kind: FailureKind,
        error: Exception,
    ) -> WorkItem[Payload] | None:
        record = self._records[item.key]
        progress = self.listener.progress_of(item)
        raised = isinstance(error, RayTaskError)
        record.barren_deaths = 0 if raised or progress > record.progress else record.barren_deaths + 1
        record.progress = max(progress, record.progress)
        counted = raised or record.barren_deaths >= BARREN_DEATHS
        record.counted += counted
        quarantined = record.counted >= self.max_attempts
        failure = AttemptFailure(
            kind=kind,
            counted=counted,
            counted_attempts=record.counted,
            quarantined=quarantined,
            reason=_first_line(error),
            traceback=redact(str(error)),
        )
        self.listener.failed(item, attempt, failure)
        if quarantined:
            return item
        if raised:
            # What raised once may raise again: let the others go first.
            self._waiting.append(item)
            self._waiting.sort(key=lambda other: (self._records[other.key].counted > 0, other.order))
        else:
            self._waiting.insert(0, item)
        return None


def _kind_of(error: RayTaskError) -> FailureKind:
    return "out_of_memory" if type(error.cause).__name__ in _OUT_OF_MEMORY else "exception"


def _is_out_of_memory(error: Exception) -> bool:
    # The memory monitor kills the worker of an actor: what arrives is an ActorDiedError that says so in its text.
    return isinstance(error, OutOfMemoryError) or "running low on memory" in str(error)


def _first_line(error: Exception) -> str:
    """One line that says what happened, without the remote traceback that Ray puts into its messages."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines() or [""]
    # An actor whose constructor raised: Ray puts the constructor's traceback into the text, its error last.
    line = lines[-1] if isinstance(cause, ActorDiedError) and "creation task" in lines[0] else lines[0]
    return redact(f"{type(cause).__name__}: {line}"[:_REASON_CHARACTERS])

"""An explicit pool of Ray actors: one item in flight each, deaths survived, poison put aside, nodes followed.

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
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayTaskError

from lrag_ray.engine.failures import (
    WORKER_LOST,
    FailureKind,
    KernelKilledError,
    WorkerStalledError,
    explain,
    first_line,
    raised_at_start,
)
from lrag_ray.engine.oom import OomKills, Place
from lrag_ray.engine.queue import Payload, Turn, WaitingItems, WorkItem, Yielded
from lrag_ray.engine.sizing import NodeRoom, PoolSize, WorkerShape, draining_nodes, usable_nodes, wanted_workers
from lrag_ray.engine.stalls import StallWatch
from lrag_ray.errors import ClusterError
from lrag_ray.store.run_dir import new_attempt_id

BARREN_DEATHS = 3
"""A death counts as an attempt from this many on that in a row brought nothing forward."""

_POLL_S = 0.25
_LOOK_EVERY_S = 1.0
"""How often nodes, sizes and stalls are looked at."""
_START_FAILURES = 3
_START_DEATHS = 12
"""A node that is lost takes all workers with it that were starting there; what dies more often has another cause."""
_LONGEST_PAUSE_S = 60.0
_UNPLACED_S = 30.0

Result = TypeVar("Result")
ResultIn = TypeVar("ResultIn", contravariant=True)


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

    def yielded(self, item: WorkItem[Payload], worker: str, reason: str) -> None:
        """A worker gave an item back; it goes on elsewhere."""

    def failed(self, item: WorkItem[Payload], attempt: str, failure: AttemptFailure) -> None:
        """An attempt failed; the item is tried again unless `failure.quarantined`."""

    def worker_lost(self, worker: str, reason: str) -> None:
        """A worker died and will be replaced."""

    def unplaced(self, seconds: float) -> None:
        """For so long no worker could start; told once."""

    def too_large(self, item: WorkItem[Payload], largest_node: float) -> None:
        """The item needs more memory than any node has (bytes); it waits for one that has. Told once per amount."""

    def progress_of(self, item: WorkItem[Payload]) -> int | None:
        """How far the item is on storage, in any unit that grows; None where that cannot be found out."""

    def tick(self) -> None:
        """Called a few times a second."""


@dataclass
class _Worker(Generic[Payload]):
    name: str
    actor: Any
    memory: int
    """Bytes that it has reserved."""
    ready: bool = False
    node: str | None = None
    group: str | None = None
    item: WorkItem[Payload] | None = None


@dataclass
class _Record:
    counted: int = 0
    barren_deaths: int = 0
    progress: int = 0


@dataclass
class ActorPool(Generic[Payload, Result]):
    """Runs items on as many actors as `size` and the nodes allow until each is finished or quarantined.

    An actor has a method ``ready()``, which returns its `Place` when it can work, and is given items by
    `submit`. One that finds nothing left to take is ended at once, so that its place serves others.
    """

    spawn: Callable[[str, int], Any]
    """Makes an actor handle for a worker of that name that reserves so many bytes of memory (0: none); max_restarts
    and max_task_retries must be 0."""
    submit: Callable[[Any, Payload, str], Any]
    """Sends a payload and the attempt's id to an actor; returns the reference of the result (or of a `Yielded`)."""
    listener: PoolListener[Payload, Result]
    size: PoolSize
    shape: WorkerShape
    max_attempts: int
    stalls: StallWatch | None = None
    _workers: dict[str, _Worker[Payload]] = field(default_factory=dict, init=False)
    _flights: dict[Any, tuple[_Worker[Payload], str]] = field(default_factory=dict, init=False)
    """Worker and attempt by what is waited for: an item, or, while the worker is not ready, its start."""
    _records: dict[str, _Record] = field(default_factory=dict, init=False)
    _quarantined: list[WorkItem[Payload]] = field(default_factory=list, init=False)
    _nodes: list[NodeRoom] = field(default_factory=list, init=False)
    _draining: set[str] = field(default_factory=set, init=False)
    _oom_kills: OomKills = field(default_factory=OomKills, init=False)
    _told_too_large: set[int] = field(default_factory=set, init=False)
    _spawned: int = field(default=0, init=False)
    _failed_starts: int = field(default=0, init=False)
    _spawn_after: float = field(default=0.0, init=False)
    _look_after: float = field(default=0.0, init=False)
    _tick_after: float = field(default=0.0, init=False)

    def run(self, items: Sequence[WorkItem[Payload]]) -> list[WorkItem[Payload]]:
        """Work through `items`; returns those that were quarantined.

        Raises ClusterError when workers fail to start again and again and none works. The actors are gone afterwards,
        whatever happens.
        """
        self._waiting = WaitingItems(items)
        self._records = {item.key: _Record(progress=item.progress) for item in items}
        self._tell_unplaced_at = time.monotonic() + _UNPLACED_S
        try:
            while self._waiting or any(worker.item is not None for worker in self._workers.values()):
                self._look_around()
                self._assign()
                self._settle_all()
                self._tick()
        finally:
            for worker in self._workers.values():
                ray.kill(worker.actor)
            self._workers.clear()
            self._flights.clear()
        return self._quarantined

    def _settle_all(self) -> None:
        if not self._flights:
            time.sleep(_POLL_S)
            return
        done, rest = ray.wait(list(self._flights), num_returns=1, timeout=_POLL_S)
        if done and rest:
            # Whatever else is done: one round serves many workers.
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for ref in done:
            # A worker that was ended meanwhile is no longer waited for.
            if ref in self._flights:
                self._settle(ref)

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._tick_after:
            self._tick_after = now + _POLL_S
            self.listener.tick()

    def _look_around(self) -> None:
        """Follow nodes, sizes and stalls."""
        now = time.monotonic()
        if now < self._look_after:
            return
        self._look_after = now + _LOOK_EVERY_S
        self._draining = draining_nodes()
        self._nodes = usable_nodes(self._draining)
        self._tell_what_has_no_room(now)
        if self.stalls is not None:
            for name in self.stalls.stalled():
                text = f"no new block for {self.stalls.timeout_s:g} s (engine.stall_timeout_s)"
                worker = self._workers[name]
                self._worker_failed(worker, self._end(worker), WorkerStalledError(text))
        self._resize()

    def _tell_what_has_no_room(self, now: float) -> None:
        if any(worker.ready for worker in self._workers.values()):
            self._tell_unplaced_at = now + _UNPLACED_S
        elif now >= self._tell_unplaced_at:
            self._tell_unplaced_at = math.inf
            self.listener.unplaced(_UNPLACED_S)
        largest = max((node.memory for node in self._nodes if self.shape.slots(node)), default=math.inf)
        for need in self._waiting.needs():
            if need > largest and need not in self._told_too_large:
                self._told_too_large.add(need)
                self.listener.too_large(self._waiting.example(need), largest)

    def _resize(self) -> None:
        """Spawn the workers that are missing; end those that never found a place and are not wanted any more."""
        needs = self._waiting.needs()
        busy = [worker for worker in self._workers.values() if worker.item is not None]
        staying = [worker for worker in self._workers.values() if worker.node not in self._draining]
        held = sorted({*needs, *(worker.memory for worker in busy)}, reverse=True)
        wanted = wanted_workers(self.size, self.shape, self._nodes, held)

        placed = sorted((worker for worker in staying if worker.ready), key=lambda worker: -worker.memory)
        starting = [worker for worker in staying if not worker.ready]
        kept: list[_Worker[Payload]] = []
        missing = []
        for memory in wanted:
            exact = next((worker for worker in starting if worker.memory == memory), None)
            if placed and placed[0].memory >= memory:
                placed.pop(0)
            elif exact is not None:
                starting.remove(exact)
                kept.append(exact)
            else:
                missing.append(memory)
        for worker in [*starting, *kept[len(self._waiting) :]]:
            self._end(worker)
        if time.monotonic() < self._spawn_after:
            return
        staying = [worker for worker in staying if worker.name in self._workers]
        without_item = sum(worker.item is None for worker in staying)
        room = min(len(wanted) - len(staying), len(self._waiting) - without_item)
        for memory in missing[: max(room, 0)]:
            # What is only held by busy workers need not be asked for again.
            fitting = [need for need in needs if need <= memory]
            if fitting:
                self._spawn(fitting[0])

    def _spawn(self, memory: int) -> None:
        name = f"worker-{self._spawned}"
        self._spawned += 1
        worker: _Worker[Payload] = _Worker(name, self.spawn(name, memory), memory)
        self._workers[name] = worker
        self._flights[worker.actor.ready.remote()] = (worker, "")

    def _assign(self) -> None:
        idle = [worker for worker in self._workers.values() if worker.ready and worker.item is None]
        smallest = min((worker.memory for worker in self._workers.values()), default=0)
        holders = Counter(worker.group for worker in self._workers.values() if worker.group is not None)
        for worker in idle:
            item = None
            if worker.node not in self._draining:
                item = self._waiting.take(worker.memory, worker.group, holders, spare_small=worker.memory > smallest)
            if item is None:
                self._end(worker)
                continue
            holders.subtract([worker.group] if worker.group is not None else [])
            worker.item, worker.group = item, item.group
            holders[item.group] += 1
            attempt = new_attempt_id()
            self._flights[self.submit(worker.actor, item.payload, attempt)] = (worker, attempt)
            if self.stalls is not None:
                self.stalls.begin(worker.name, worker.actor)
            self.listener.started(item, attempt, worker.name)

    def _settle(self, ref: Any) -> None:
        """Take in what a finished reference says."""
        worker, attempt = self._flights.pop(ref)
        if self.stalls is not None:
            self.stalls.end(worker.name)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            if worker.item is None:
                self._end(worker)
                self._worker_failed(worker, attempt, error)
            else:
                failed, worker.item = worker.item, None
                self._attempt_failed(failed, attempt, error)
            return
        except WORKER_LOST as error:
            # An unavailable actor may come back and go on; it is replaced, so it must not.
            self._end(worker)
            if self._oom_kills.explains(error, worker.node):
                text = f"the kernel ended a process of its node for want of memory, and {worker.name} died"
                self._worker_failed(worker, attempt, KernelKilledError(text))
            else:
                self._worker_failed(worker, attempt, error)
            return
        item, worker.item = worker.item, None
        if item is None:
            place: Place = result
            worker.ready, worker.node = True, place.node
            self._oom_kills.note(place)
            self._failed_starts = 0
        elif isinstance(result, Yielded):
            self._end(worker)
            self._look_after = 0.0
            self._put_back(item, "first")
            self.listener.yielded(item, worker.name, result.reason)
        else:
            self.listener.finished(item, result)

    def _end(self, worker: _Worker[Payload]) -> str:
        """Kill a worker and forget it; returns the attempt that it was at, if any."""
        ray.kill(worker.actor)
        del self._workers[worker.name]
        if self.stalls is not None:
            self.stalls.end(worker.name)
        for ref, (other, attempt) in list(self._flights.items()):
            if other is worker:
                del self._flights[ref]
                return attempt
        return ""

    def _worker_failed(self, worker: _Worker[Payload], attempt: str, error: Exception) -> None:
        self._look_after = 0.0
        self.listener.worker_lost(worker.name, first_line(error))
        if worker.item is not None:
            self._attempt_failed(worker.item, attempt, error)
            return
        self._failed_starts += 1
        most = _START_FAILURES if raised_at_start(error) else _START_DEATHS
        if self._failed_starts >= most and not any(other.ready for other in self._workers.values()):
            raise ClusterError(
                f"{self._failed_starts} workers in a row died before they were ready; the last: {first_line(error)}. "
                "Check that the nodes have the same environment as this one and room for engine.cpus_per_actor and "
                "engine.gpus_per_actor"
            ) from error
        self._spawn_after = time.monotonic() + min(_POLL_S * 2**self._failed_starts, _LONGEST_PAUSE_S)

    def _attempt_failed(self, item: WorkItem[Payload], attempt: str, error: Exception) -> None:
        record = self._records[item.key]
        raised = isinstance(error, RayTaskError)
        progress = self.listener.progress_of(item)
        if raised or (progress is not None and progress > record.progress):
            record.barren_deaths = 0
        elif progress is not None:
            record.barren_deaths += 1
        record.progress = max(progress or 0, record.progress)
        counted = raised or record.barren_deaths >= BARREN_DEATHS
        record.counted += counted
        quarantined = record.counted >= self.max_attempts
        trouble = explain(error)
        failure = AttemptFailure(
            kind=trouble.kind,
            counted=counted,
            counted_attempts=record.counted,
            quarantined=quarantined,
            reason=trouble.reason,
            traceback=trouble.traceback,
        )
        if quarantined:
            self._quarantined.append(item)
        else:
            self._put_back(item, "last" if raised else "first")
        self.listener.failed(item, attempt, failure)

    def _put_back(self, item: WorkItem[Payload], turn: Turn) -> None:
        self._waiting.put(item, turn)
        # Its worker may have been the last: look for room at once.
        self._look_after = 0.0

"""A pool of Ray actors that runs the tasks of a stage: one task or batch in flight each, replaced when they die.

Ray is asked to restart and retry nothing (`max_restarts=0`, `max_task_retries=0`): this loop replaces actors and counts
attempts (`lrag_ray.engine.attempts`), because only it can tell a task that raises from a worker that was taken away.
Actors that cannot be placed yet stay pending, which is the demand that makes a cluster scale up. What a task is, and
what is done with it, is the stage's business.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import ray
from ray.exceptions import RayTaskError

from lrag_ray.engine.actor import spawn_actor
from lrag_ray.engine.attempts import AttemptLedger
from lrag_ray.engine.board import BoardReader, start_board
from lrag_ray.engine.failures import (
    WORKER_LOST,
    KernelKilledError,
    WorkerStalledError,
    explain,
    first_line,
    raised_at_start,
)
from lrag_ray.engine.oom import OomKills, WorkerLocation
from lrag_ray.engine.queue import TaskQueue, Turn
from lrag_ray.engine.sizing import (
    NodeRoom,
    PoolSize,
    WorkerShape,
    cannot_grow,
    draining_nodes,
    usable_nodes,
    wanted_workers,
)
from lrag_ray.engine.stalls import StallWatch
from lrag_ray.errors import ClusterError, StorageError
from lrag_ray.events import (
    AttemptFailed,
    Listener,
    Notice,
    StageAdvanced,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
    TaskYielded,
    WorkerLost,
    silent,
)
from lrag_ray.interrupts import take_next
from lrag_ray.printable import counted
from lrag_ray.stages.spec import Outcome, Parted, Payload, Refused, Stage, Task, Yielded
from lrag_ray.store.records import FailureRecord, new_attempt_id

_POLL_S = 0.25
_LOOK_EVERY_S = 1.0
"""How often nodes, sizes and stalls are looked at."""
_START_FAILURES = 3
_START_DEATHS = 12
"""A node that is lost takes all workers that were starting there with it; more deaths than that have another cause."""
_LONGEST_PAUSE_S = 60.0
_UNPLACED_S = 30.0
LEAVE_S = 45.0
"""How long workers may take to finish their block and store it after an interruption; a lost lease allows 60 s."""


@dataclass
class _Worker(Generic[Payload]):
    name: str
    actor: Any
    memory: int
    """Bytes that it has reserved."""
    ready: bool = False
    node: str | None = None
    group: str | None = None
    tasks: Sequence[Task[Payload]] = ()
    """What it is at: one task, or several of one batch."""

    def label(self, i: int) -> str:
        """Its name in events of its task `i`."""
        return f"{self.name}+{i}" if i else self.name


class ActorPool(Generic[Payload]):
    """Runs tasks on as many actors as `size` and the nodes allow until each is finished or quarantined.

    An actor that finds nothing left to take is ended at once, so that its place serves others.
    """

    def __init__(
        self,
        stage: Stage[Payload],
        size: PoolSize,
        *,
        max_attempts: int = 3,
        stall_timeout_s: float | None = None,
        address: str | None = None,
        listener: Listener = silent,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`address` is engine.address: a cluster of our own on this machine cannot grow.

        `listener` receives the events of the tasks; `tick` is called a few times a second, from the same thread.
        """
        self._stage = stage
        self._size = size
        self._shape = WorkerShape(*stage.resources)
        self._ledger = AttemptLedger(stage.name, max_attempts)
        self._stalls = StallWatch(stall_timeout_s) if stall_timeout_s else None
        self._address = address
        self._report = listener
        self._on_tick = tick
        self._workers: dict[str, _Worker[Payload]] = {}
        self._flights: dict[Any, tuple[_Worker[Payload], Sequence[str]]] = {}
        """Worker and attempts, one per task, by what is waited for: tasks or, while it is not ready, its start."""
        self._quarantined: list[Task[Payload]] = []
        self._nodes: list[NodeRoom] = []
        self._draining: set[str] = set()
        self._oom_kills = OomKills()
        self._reported_too_large: set[int] = set()
        self._spawned = self._failed_starts = self._settled = self._total = 0
        self._spawn_after = self._look_after = self._tick_after = 0.0

    def run(self, tasks: Sequence[Task[Payload]]) -> list[Task[Payload]]:
        """Work through `tasks`; returns those that were quarantined. Needs Ray.

        Raises ClusterError where workers fail to start again and again and none works, or where a task needs more
        memory than a node of a cluster that cannot grow has; and the stage's `fatal` errors. The actors are gone
        afterwards, whatever happens.
        """
        self._queue = TaskQueue(tasks)
        self._total = len(tasks)
        for task in tasks:
            self._ledger.start(task.key, task.progress)
        self._report_unplaced_at = time.monotonic() + _UNPLACED_S
        self._board = start_board()
        self._board_reader = BoardReader(self._board)
        self._stage_ref = ray.put(self._stage)
        try:
            while self._queue or any(worker.tasks for worker in self._workers.values()):
                self._look_around()
                self._assign()
                self._settle_all()
                self._tick()
        except KeyboardInterrupt:
            self._store_what_is_finished()
            raise
        finally:
            for worker in self._workers.values():
                ray.kill(worker.actor)
            ray.kill(self._board)
            self._workers.clear()
            self._flights.clear()
        return self._quarantined

    def _store_what_is_finished(self) -> None:
        """After an interruption: workers at a task store what they have finished, as on a node that drains."""
        flights = {ref: worker for ref, (worker, _) in self._flights.items() if worker.ready and worker.tasks}
        if not flights:
            return
        take_next()
        self._report(
            Notice(f"interrupted: {counted(len(flights), 'worker')} to store what is finished; again ends them now")
        )
        for worker in flights.values():
            worker.actor.leave.remote()
        ray.wait(list(flights), num_returns=len(flights), timeout=LEAVE_S, fetch_local=False)

    def _settle_all(self) -> None:
        if not self._flights:
            time.sleep(_POLL_S)
            return
        done, rest = ray.wait(list(self._flights), num_returns=1, timeout=_POLL_S)
        if done and rest:
            # Whatever else is done: one round serves many workers.
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for ref in done:
            # A worker that was killed in the meantime is no longer waited for.
            if ref in self._flights:
                self._settle(ref)

    def _tick(self) -> None:
        now = time.monotonic()
        if now < self._tick_after:
            return
        self._tick_after = now + _POLL_S
        self._on_tick()
        for name, state in self._board_reader.new_states().items():
            worker = self._workers.get(name)
            # A state may arrive when the worker is done or gone.
            if worker is None:
                continue
            for i, task in enumerate(worker.tasks):
                advanced = (worker.label(i), state.done, state.total, state.step)
                self._report(TaskAdvanced(self._stage.name, task.title, *advanced))

    def _look_around(self) -> None:
        """Follow nodes, sizes and stalls."""
        now = time.monotonic()
        if now < self._look_after:
            return
        self._look_after = now + _LOOK_EVERY_S
        self._draining = draining_nodes()
        self._nodes = usable_nodes(self._draining)
        self._report_what_has_no_room(now)
        if self._stalls is not None:
            for name in self._stalls.stalled():
                text = f"no new block for {self._stalls.timeout_s:g} s (engine.stall_timeout_s)"
                worker = self._workers[name]
                self._worker_failed(worker, self._end(worker), WorkerStalledError(text))
        self._resize()

    def _report_what_has_no_room(self, now: float) -> None:
        if any(worker.ready for worker in self._workers.values()):
            self._report_unplaced_at = now + _UNPLACED_S
        elif now >= self._report_unplaced_at:
            self._report_unplaced_at = math.inf
            self._warn(_no_room(self._shape, self._nodes, _UNPLACED_S))
        largest = max((node.memory for node in self._nodes if self._shape.slots(node)), default=math.inf)
        for need in self._queue.needs():
            if need > largest and need not in self._reported_too_large:
                self._reported_too_large.add(need)
                text = (
                    f"{self._queue.example(need).title}: {self._stage.memory_use} grows to {need / 1e9:.1f} GB of host "
                    f"memory, and the largest node lets actors reserve {largest / 1e9:.1f} GB. Use nodes with more "
                    "memory (or a larger --memory of `ray start`), shorter durations, or less of it there "
                    "(methods.<name>.history, engine.bank)"
                )
                if cannot_grow(self._address, self._nodes):
                    raise ClusterError(text)
                self._warn(f"{text}. It waits for a larger node")

    def _resize(self) -> None:
        """Spawn the workers that are missing; end those that never found a place and are not wanted any more."""
        needs = self._queue.needs()
        busy = [worker for worker in self._workers.values() if worker.tasks]
        turns = self._queue.turns(self._stage.tasks_at_once)
        staying = [worker for worker in self._workers.values() if worker.node not in self._draining]
        held = sorted({*needs, *(worker.memory for worker in busy)}, reverse=True)
        wanted = wanted_workers(self._size, self._shape, self._nodes, held)

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
        for worker in [*starting, *kept[turns:]]:
            self._end(worker)
        if time.monotonic() < self._spawn_after:
            return
        staying = [worker for worker in staying if worker.name in self._workers]
        without_task = sum(not worker.tasks for worker in staying)
        room = min(len(wanted) - len(staying), turns - without_task)
        for memory in missing[: max(room, 0)]:
            # What only busy workers hold need not be asked for again.
            fitting = [need for need in needs if need <= memory]
            if fitting:
                self._spawn(fitting[0])

    def _spawn(self, memory: int) -> None:
        name = f"worker-{self._spawned}"
        self._spawned += 1
        actor = spawn_actor(self._stage, self._stage_ref, name, self._board, memory)
        worker: _Worker[Payload] = _Worker(name, actor, memory)
        self._workers[name] = worker
        self._flights[worker.actor.ready.remote()] = (worker, ())

    def _assign(self) -> None:
        idle = [worker for worker in self._workers.values() if worker.ready and not worker.tasks]
        smallest = min((worker.memory for worker in self._workers.values()), default=0)
        holders = Counter(worker.group for worker in self._workers.values() if worker.group is not None)
        for worker in idle:
            task = None
            if worker.node not in self._draining:
                task = self._queue.take(worker.memory, worker.group, holders, spare_small=worker.memory > smallest)
            if task is None:
                self._end(worker)
                continue
            holders.subtract([worker.group] if worker.group is not None else [])
            at_once = self._stage.tasks_at_once
            worker.tasks, worker.group = [task, *self._queue.take_beside(task, at_once - 1)], task.group
            holders[task.group] += 1
            attempts = [new_attempt_id() for _ in worker.tasks]
            if at_once > 1:
                ref = worker.actor.work_together.remote([each.payload for each in worker.tasks], attempts)
            else:
                ref = worker.actor.work.remote(task.payload, attempts[0])
            self._flights[ref] = (worker, attempts)
            if self._stalls is not None:
                self._stalls.begin(worker.name, worker.actor)
            for i, (each, attempt) in enumerate(zip(worker.tasks, attempts, strict=True)):
                self._report(TaskStarted(self._stage.name, each.title, attempt, worker.label(i), worker.node or ""))

    def _settle(self, ref: Any) -> None:
        """Take in the answer of a finished reference."""
        worker, attempts = self._flights.pop(ref)
        if self._stalls is not None:
            self._stalls.end(worker.name)
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            if not worker.tasks:
                self._end(worker)
                self._worker_failed(worker, attempts, error)
            else:
                failed, worker.tasks = worker.tasks, ()
                self._attempts_failed(failed, attempts, error)
            return
        except WORKER_LOST as error:
            # An unavailable actor may come back and continue; it is replaced, so it must not.
            self._end(worker)
            if self._oom_kills.explains(error, worker.node):
                text = f"the kernel ended a process of its node for want of memory, and {worker.name} died"
                self._worker_failed(worker, attempts, KernelKilledError(text))
            else:
                self._worker_failed(worker, attempts, error)
            return
        tasks, worker.tasks = worker.tasks, ()
        if not tasks:
            location: WorkerLocation = answer
            worker.ready, worker.node = True, location.node
            self._oom_kills.note(location)
            self._failed_starts = 0
            return
        outcomes: Sequence[Outcome | Parted] = answer if self._stage.tasks_at_once > 1 else [answer]
        if any(isinstance(outcome, Yielded) for outcome in outcomes):
            self._end(worker)
        for i, (task, attempt, outcome) in enumerate(zip(tasks, attempts, outcomes, strict=True)):
            self._task_returned(worker.label(i), task, attempt, outcome)

    def _task_returned(self, worker: str, task: Task[Payload], attempt: str, outcome: Outcome | Parted) -> None:
        if isinstance(outcome, Yielded):
            self._put_back(task, "first")
            self._report(TaskYielded(self._stage.name, task.title, worker, outcome.reason))
        elif isinstance(outcome, Parted):
            self._put_back(replace(task, batch=""), "first")
            self._report(TaskYielded(self._stage.name, task.title, worker, outcome.reason))
        elif isinstance(outcome, Refused):
            self._failed(task, self._ledger.refused(task.key, task.title, attempt, outcome.reason), "last")
        else:
            for note in outcome.notes:
                self._warn(note)
            self._report(TaskFinished(self._stage.name, task.title, outcome))
            self._advance()

    def _end(self, worker: _Worker[Payload]) -> Sequence[str]:
        """Kill a worker and forget it; returns the attempts that it was at."""
        ray.kill(worker.actor)
        del self._workers[worker.name]
        if self._stalls is not None:
            self._stalls.end(worker.name)
        for ref, (other, attempts) in list(self._flights.items()):
            if other is worker:
                del self._flights[ref]
                return attempts
        return ()

    def _worker_failed(self, worker: _Worker[Payload], attempts: Sequence[str], error: Exception) -> None:
        self._look_after = 0.0
        self._report(WorkerLost(worker.name, first_line(error)))
        if worker.tasks:
            self._attempts_failed(worker.tasks, attempts, error)
            return
        self._failed_starts += 1
        most = _START_FAILURES if raised_at_start(error) else _START_DEATHS
        if self._failed_starts >= most and not any(other.ready for other in self._workers.values()):
            raise ClusterError(
                f"{counted(self._failed_starts, 'worker')} in a row died before being ready; the last: "
                f"{first_line(error)}. "
                "Check that the nodes have the same environment as this one and room for engine.cpus_per_actor and "
                "engine.gpus_per_actor"
            ) from error
        self._spawn_after = time.monotonic() + min(_POLL_S * 2**self._failed_starts, _LONGEST_PAUSE_S)

    def _attempts_failed(self, tasks: Sequence[Task[Payload]], attempts: Sequence[str], error: Exception) -> None:
        """What was done together is done alone the next time, unless its worker was lost with progress made."""
        for task, attempt in zip(tasks, attempts, strict=True):
            self._attempt_failed(task, attempt, error, [other.title for other in tasks if other is not task])

    def _attempt_failed(self, task: Task[Payload], attempt: str, error: Exception, others: Sequence[str]) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if self._stage.fatal and isinstance(cause, self._stage.fatal):
            raise cause from error
        try:
            progress = self._stage.progress(task)
        except StorageError as unread:
            self._warn(f"{task.title}: its progress cannot be read: {unread}")
            progress = None
        why = explain(error)
        failure = self._ledger.failed(task.key, task.title, attempt, why, progress, others=others)
        if others and not failure.quarantined and (why.raised or self._ledger.is_barren(task.key)):
            task = replace(task, batch="")
            self._warn(f"{task.title} failed together with {', '.join(others)}: it is tried again alone")
        self._failed(task, failure, "last" if why.raised else "first")

    def _failed(self, task: Task[Payload], failure: FailureRecord, turn: Turn) -> None:
        if failure.quarantined:
            self._quarantined.append(task)
        else:
            self._put_back(task, turn)
        self._report(AttemptFailed(failure))
        if failure.quarantined:
            self._advance()
            if (error := self._stage.ends_with(failure)) is not None:
                raise error

    def _put_back(self, task: Task[Payload], turn: Turn) -> None:
        self._queue.put(task, turn)
        # Its worker may have been the last: look for room at once.
        self._look_after = 0.0

    def _advance(self) -> None:
        self._settled += 1
        self._report(StageAdvanced(self._stage.name, self._settled, self._total))

    def _warn(self, text: str) -> None:
        self._report(Notice(text, warning=True))


def _no_room(shape: WorkerShape, nodes: Sequence[NodeRoom], seconds: float) -> str:
    """Why no worker has started for this long: no node is large enough, or what is there is taken or slow."""
    has = ray.cluster_resources()
    room = {name: round(has[name], 2) for name in ("CPU", "GPU") if name in has}
    text = (
        f"no worker has started for {seconds:g} s: each takes {shape.cpus:g} CPUs and {shape.gpus:g} GPUs of one node, "
        f"and the whole cluster has {room}"
    )
    if any(shape.slots(node) for node in nodes):
        return f"{text}. Either other jobs use them (`ray status` shows it) or starting is slow on a busy machine"
    return f"{text}. Waiting for room"

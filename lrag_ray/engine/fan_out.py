"""A stage's tasks through Ray Data: each once at a time, none waiting behind another.

Ray Data by itself repeats a task whose worker died forever. A supervisor (an actor that reserves nothing) keeps the
attempt ledger that the actor pool keeps in the driver: exceptions are retried within `max_attempts`, deaths count from
the third in a row without progress, and a task that exhausts its attempts is quarantined.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lrag_ray.config.redaction import redact
from lrag_ray.engine.attempts import AttemptLedger
from lrag_ray.engine.failures import Cause, explain_here
from lrag_ray.errors import ClusterError, StorageError
from lrag_ray.events import (
    AttemptFailed,
    Event,
    Listener,
    StageAdvanced,
    TaskFinished,
    TaskStarted,
    TaskYielded,
    silent,
)
from lrag_ray.stages.spec import Outcome, Payload, Refused, Resources, Stage, StageName, Task, WorkerState, Yielded
from lrag_ray.store.records import FailureRecord, new_attempt_id

_LOOK_EVERY_S = 0.2

Verdict = Literal["go", "died", "settled", "stop"]
"""What a worker does with a task that it received: begin; report that the worker before it died; pass it on because
nothing is left to do; pass it on because all work is to stop."""


def room_for(each: Resources, free: Mapping[str, float]) -> int:
    """How many such workers fit into `free` (CPU and GPU)."""
    cpus = free.get("CPU", 0) / each.cpus
    gpus = free.get("GPU", 0) / each.gpus if each.gpus else cpus
    # Sums of shares such as 0.1 fall short of a whole by a rounding.
    return max(0, int(min(cpus, gpus) + 1e-6))


class _Open(NamedTuple):
    """An attempt that has not ended."""

    attempt: str
    worker: str


class Supervisor:
    """Keeps the attempt ledger and the events of one fan-out; made into an actor by `FanOut`."""

    def __init__(self, stage: StageName, max_attempts: int) -> None:
        self._stage: StageName = stage
        self._ledger = AttemptLedger(stage, max_attempts)
        self._open: dict[str, _Open] = {}
        self._settled: set[str] = set()
        self._events: list[Event] = []
        self._stopped = False

    def begin(self, key: str, title: str, attempt: str, worker: str) -> Verdict:
        """A worker wants to begin an attempt."""
        if key in self._settled:
            # Its worker died between the end of the task and the arrival of the answer.
            return "settled"
        if key in self._open:
            return "died"
        if self._stopped:
            return "stop"
        self._open[key] = _Open(attempt, worker)
        self._events.append(TaskStarted(self._stage, title, attempt, worker))
        return "go"

    def died(self, key: str, title: str, progress: int | None) -> None:
        """The worker of the open attempt died."""
        lost = self._open.pop(key)
        reason = f"{lost.worker} died (out of memory?)"
        self._failed(key, self._ledger.failed(key, title, lost.attempt, Cause("death", False, reason, ""), progress))

    def raised(self, key: str, title: str, cause: Cause) -> bool:
        """The open attempt raised; returns whether the task is to be tried again."""
        attempt = self._open.pop(key).attempt
        self._failed(key, self._ledger.failed(key, title, attempt, cause))
        return key not in self._settled

    def ended(self, key: str, title: str, outcome: Outcome) -> None:
        """The open attempt ended."""
        attempt, worker = self._open.pop(key)
        if isinstance(outcome, Refused):
            self._failed(key, self._ledger.refused(key, title, attempt, outcome.reason))
        elif isinstance(outcome, Yielded):
            self._events.append(TaskYielded(self._stage, title, worker, outcome.reason))
        else:
            self._settled.add(key)
            self._events.append(TaskFinished(self._stage, title, outcome))

    def advanced(self, done: int, total: int) -> None:
        """`done` tasks have come back, in whatever way they ended."""
        self._events.append(StageAdvanced(self._stage, done, total))

    def stop(self) -> None:
        """Let workers stop at their next look."""
        self._stopped = True

    def stopped(self) -> bool:
        """Whether to stop."""
        return self._stopped

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def _failed(self, key: str, failure: FailureRecord) -> None:
        if failure.quarantined:
            self._settled.add(key)
        self._events.append(AttemptFailed(failure))


class FanOut(Generic[Payload]):
    """One wave of a stage's tasks on `workers` actors of Ray Data. Needs Ray."""

    def __init__(
        self, stage: Stage[Payload], workers: int, *, max_attempts: int = 3, listener: Listener = silent
    ) -> None:
        self._stage, self._workers, self._report = stage, workers, listener
        # On the driver's own node, so that it is not lost while the wave continues.
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": self._here}
        self._supervisor = ray.remote(Supervisor).options(**options).remote(stage.name, max_attempts)

    def stop(self) -> None:
        """Have the workers stop at their next look; from any thread. `run` then ends by itself soon."""
        self._supervisor.stop.remote()

    def run(self, tasks: Sequence[Task[Payload]]) -> list[Task[Payload]]:
        """Work through `tasks` once; returns those that were quarantined.

        `listener` receives the events, in this thread. Raises ClusterError where workers cannot start.
        """
        quarantined: set[str] = set()
        # In a process of its own: Ray's native code complains on the terminal of the process that starts Ray Data's
        # actors, at every wave. Where that process dies, Ray starts another, which passes over what is settled.
        options = {"num_cpus": 0, "scheduling_strategy": self._here}
        wave = ray.remote(_wave).options(**options).remote(self._stage, self._supervisor, tasks, self._workers)
        running = [wave]
        try:
            while running:
                _, running = ray.wait(running, timeout=_LOOK_EVERY_S)
                self._take_events(quarantined)
            ray.get(wave)
        except ray.exceptions.WorkerCrashedError as error:
            raise ClusterError(
                f"{self._stage.name}: the process that hands out its tasks died at each of Ray's tries (out of memory?)"
            ) from error
        except ray.exceptions.RayError as error:
            # What a task does wrong is in the ledger; this is a worker that cannot even start.
            lines = str(error).strip().splitlines()
            raise ClusterError(
                f"{self._stage.name} workers cannot start: {redact(lines[-1] if lines else repr(error))}"
            ) from error
        finally:
            ray.cancel(wave, force=True)
            ray.kill(self._supervisor)
        return [task for task in tasks if task.title in quarantined]

    def _take_events(self, quarantined: set[str]) -> None:
        for event in ray.get(self._supervisor.take_events.remote()):
            self._report(event)
            if isinstance(event, AttemptFailed) and event.failure.quarantined:
                quarantined.add(event.failure.task)
                if (error := self._stage.ends_with(event.failure)) is not None:
                    raise error


def _wave(stage: Stage[Any], supervisor: Any, tasks: Sequence[Task[Any]], workers: int) -> None:
    """Have Ray Data hand the tasks to its actors, and tell the supervisor of each that comes back."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"key": task.key, "task": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _DataWorker,
        fn_constructor_args=(stage, supervisor),
        # By default a second task would wait behind a busy worker.
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=stage.resources.cpus,
        num_gpus=stage.resources.gpus or None,
    )
    for done, _ in enumerate(dataset.iter_rows(), start=1):
        ray.get(supervisor.advanced.remote(done, len(tasks)))


class _DataHost:
    """The place where a stage's worker runs, inside an actor of Ray Data."""

    def __init__(self, supervisor: Any) -> None:
        self.name = f"worker-{ray.get_runtime_context().get_actor_id()[:8]}"
        self._supervisor = supervisor

    def must_leave(self) -> bool:
        """Whether the wave is to stop."""
        return bool(ray.get(self._supervisor.stopped.remote()))

    def report(self, state: WorkerState) -> None:
        """Waves show whole tasks only."""


class _DataWorker:
    """Sets a stage up and does one task at a time, with its retries."""

    def __init__(self, stage: Stage[Any], supervisor: Any) -> None:
        self._stage, self._supervisor = stage, supervisor
        self._host = _DataHost(supervisor)
        self._worker = stage.open(self._host)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        task: Task[Any] = pickle.loads(row["task"])
        while self._attempt(task):
            pass
        return {"key": task.key}

    def _attempt(self, task: Task[Any]) -> bool:
        """Make one attempt; returns whether there is to be another."""
        supervisor, attempt = self._supervisor, new_attempt_id()
        verdict: Verdict = ray.get(supervisor.begin.remote(task.key, task.title, attempt, self._host.name))
        if verdict == "died":
            ray.get(supervisor.died.remote(task.key, task.title, self._progress(task)))
            return True
        if verdict != "go":
            return False
        try:
            outcome = self._worker.work(task.payload, attempt)
        except Exception as error:  # noqa: BLE001 - recorded as this task's failed attempt; the others continue
            again = bool(ray.get(supervisor.raised.remote(task.key, task.title, explain_here(error))))
            if again and _gpu_is_lost():
                # Everything after would fail in this process; Ray starts another one and hands it the task again.
                os._exit(1)
            return again
        ray.get(supervisor.ended.remote(task.key, task.title, outcome))
        return False

    def _progress(self, task: Task[Any]) -> int | None:
        try:
            return self._stage.progress(task)
        except StorageError:
            return None


def _gpu_is_lost() -> bool:
    """Whether CUDA refuses all further work in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

"""The one actor that runs any stage in the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, cast

import ray

from lrag_ray.engine.board import BoardWriter
from lrag_ray.engine.oom import WorkerLocation, worker_location
from lrag_ray.engine.sizing import this_node_drains
from lrag_ray.stages.spec import BatchWorker, Outcome, Parted, Payload, Stage, WorkerState

WATCH = "watch"
"""Concurrency group of the methods that answer while the actor works."""


class ActorHost:
    """The place where a stage's worker runs, inside an actor."""

    def __init__(self, name: str, board: Any) -> None:
        self.name = name
        self.steps = 0
        """Signs of life."""
        self.left = False
        """The stage is over."""
        self._board = BoardWriter(board, name)

    def must_leave(self) -> bool:
        """Whether the stage is over or the actor's node drains."""
        return self.left or this_node_drains()

    def report(self, state: WorkerState) -> None:
        """Count a step, and show it on the board at most once a second."""
        self.steps += 1
        self._board.write(state)


class StageActor(Generic[Payload]):
    """Sets a stage up and does one task at a time, or one batch."""

    def __init__(self, stage: Stage[Payload], name: str, board: Any) -> None:
        self._host = ActorHost(name, board)
        self._worker = stage.open(self._host)

    def ready(self) -> WorkerLocation:
        """Answers once the actor can work."""
        return worker_location()

    def work(self, payload: Payload, attempt: str) -> Outcome:
        """Do a task."""
        self._host.steps += 1
        return self._worker.work(payload, attempt)

    def work_together(self, payloads: Sequence[Payload], attempts: Sequence[str]) -> Sequence[Outcome | Parted]:
        """Do tasks of one batch."""
        self._host.steps += 1
        return cast(BatchWorker[Payload], self._worker).work_together(payloads, attempts)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def leave(self) -> None:
        """Let the task that is worked on store what is finished and return."""
        self._host.left = True

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def steps(self) -> int:
        """Steps taken so far; answers while `work` continues."""
        return self._host.steps


def spawn_actor(stage: Any, stage_ref: Any, name: str, board: Any, memory: int) -> Any:
    """Ask Ray for an actor of `stage` that reserves `memory` bytes; Ray restarts and retries nothing.

    `stage_ref` is the stage in the object store: one copy instead of one in every creation task.
    """
    needs = stage.resources
    made = ray.remote(
        num_cpus=needs.cpus,
        num_gpus=needs.gpus,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={WATCH: 1},
        **({"memory": memory} if memory else {}),
    )
    return made(StageActor).remote(stage_ref, name, board)

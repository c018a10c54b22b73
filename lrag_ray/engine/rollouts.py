"""The rollout stage: open work through the actor pool, told as events and written down where it fails."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import ray

from lrag_ray.config.schema import EngineSection, RunConfig
from lrag_ray.engine.actor import ActorSpec, RolloutActor, no_room, spawn_actor
from lrag_ray.engine.pool import ActorPool, AttemptFailure, WorkItem
from lrag_ray.engine.progress import (
    AttemptFailed,
    BoardReader,
    Notice,
    Progress,
    RolloutAdvanced,
    RolloutFinished,
    RolloutStarted,
    StageAdvanced,
    WorkerLost,
    start_board,
)
from lrag_ray.engine.rollout_work import RolloutResult, RolloutTask
from lrag_ray.store.records import FailureRecord, RolloutId, now_utc
from lrag_ray.store.run_dir import RunDirectory


def run_rollouts(
    config: RunConfig, run: RunDirectory, items: Sequence[WorkItem[RolloutTask]], progress: Progress
) -> list[RolloutId]:
    """Bring `items` to their commits; returns the rollouts that were given up.

    Needs Ray. Raises ClusterError where no worker can be started.
    """
    board = start_board(f"lrag-progress-{secrets.token_hex(4)}")
    # One copy in the object store instead of one in every creation task.
    spec = ray.put(ActorSpec(run.storage.address, config, board))
    listener = _Listener(run, config.engine, BoardReader(board), len(items), progress)
    pool: ActorPool[RolloutTask, RolloutResult] = ActorPool(
        spawn=lambda name: spawn_actor(RolloutActor, spec, name, config.engine),
        submit=lambda actor, task, attempt: actor.work.remote(task, attempt),
        listener=listener,
        size=config.engine.actors,
        max_attempts=config.engine.max_attempts,
    )
    try:
        given_up = pool.run(items)
    finally:
        ray.kill(board)
    # Horizons of a method that is not nested are items of their own.
    return list({item.payload.rollout.path: item.payload.rollout for item in given_up}.values())


class _Listener:
    """Turns what the pool tells into events and failure records."""

    def __init__(
        self, run: RunDirectory, engine: EngineSection, board: BoardReader, total: int, progress: Progress
    ) -> None:
        self._run = run
        self._engine = engine
        self._board = board
        self._total = total
        self._progress = progress
        self._done = 0

    def started(self, item: WorkItem[RolloutTask], attempt: str, worker: str) -> None:
        self._progress(RolloutStarted(item.payload.rollout, attempt, worker))

    def finished(self, item: WorkItem[RolloutTask], result: RolloutResult) -> None:
        for note in result.notes:
            self._progress(Notice(note, warning=True))
        self._progress(
            RolloutFinished(
                rollout=item.payload.rollout,
                horizons=result.committed,
                blocks_generated=result.blocks_generated,
                blocks_resumed=result.blocks_resumed,
                seconds=result.seconds,
            )
        )
        self._advance()

    def failed(self, item: WorkItem[RolloutTask], attempt: str, failure: AttemptFailure) -> None:
        record = FailureRecord(
            rollout=item.payload.rollout,
            rollout_key=item.payload.rollout_key,
            attempt=attempt,
            kind=failure.kind,
            counted=failure.counted,
            counted_attempts=failure.counted_attempts,
            quarantined=failure.quarantined,
            reason=failure.reason,
            traceback=failure.traceback,
            created_at=now_utc(),
        )
        self._run.record_failure(record)
        self._progress(AttemptFailed(record))
        if failure.quarantined:
            self._advance()

    def worker_lost(self, worker: str, reason: str) -> None:
        self._progress(WorkerLost(worker, reason))

    def unplaced(self, seconds: float) -> None:
        self._progress(Notice(no_room(self._engine, seconds), warning=True))

    def progress_of(self, item: WorkItem[RolloutTask]) -> int:
        rollout = item.payload.rollout
        inventory = self._run.inventory(rollout)
        return inventory.frames_stored(rollout) + len(inventory.commits.get(rollout.path, {}))

    def tick(self) -> None:
        for worker, state in self._board.new_states().items():
            self._progress(RolloutAdvanced(state.rollout, worker, state.blocks, state.blocks_total, state.step))

    def _advance(self) -> None:
        self._done += 1
        self._progress(StageAdvanced("rollouts", self._done, self._total))

"""The rollout stage: open work through the actor pool, told as events and written down where it fails."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import ray

from lrag_ray.config.methods import resolve_method
from lrag_ray.config.schema import EngineSection, RunConfig
from lrag_ray.engine.actor import ActorSpec, RolloutActor, no_room, pool_shape, spawn_actor
from lrag_ray.engine.board import BoardReader, start_board
from lrag_ray.engine.pool import ActorPool, AttemptFailure
from lrag_ray.engine.queue import WorkItem
from lrag_ray.engine.sizing import draining_nodes, gets_no_larger, usable_nodes
from lrag_ray.engine.stalls import StallWatch
from lrag_ray.errors import ClusterError, StorageError
from lrag_ray.events import (
    AttemptFailed,
    Notice,
    Progress,
    RolloutAdvanced,
    RolloutFinished,
    RolloutStarted,
    RolloutYielded,
    StageAdvanced,
    WorkerLost,
)
from lrag_ray.pipelines.plan import history_bytes
from lrag_ray.stages.rollout.pending import stored_pieces
from lrag_ray.stages.rollout.worker import RolloutResult, RolloutTask
from lrag_ray.store.records import FailureRecord, RolloutId, now_utc
from lrag_ray.store.run_dir import RunDirectory

UNWRITTEN_FOR_S = 600.0
"""So long a driver goes on while the reasons of failures cannot be written to storage."""
_WRITE_AGAIN_S = 15.0


def run_rollouts(
    config: RunConfig, run: RunDirectory, items: Sequence[WorkItem[RolloutTask]], progress: Progress
) -> list[RolloutId]:
    """Bring `items` to their commits; returns the rollouts that were given up.

    Needs Ray. Raises ClusterError where no worker can be started or a history will never fit, and StorageError where
    failures could not be written down for ten minutes.
    """
    board = start_board(f"lrag-progress-{secrets.token_hex(4)}")
    engine = config.engine
    # One copy in the object store instead of one in every creation task.
    spec = ray.put(ActorSpec(run.storage.address, config, run.require().created_at, board))
    listener = _Listener(run, engine, BoardReader(board), len(items), progress)
    size, shape = pool_shape(engine)
    timeout_s = engine.stall_timeout_s
    pool: ActorPool[RolloutTask, RolloutResult] = ActorPool(
        spawn=lambda name, memory: spawn_actor(RolloutActor, spec, name, engine, memory=memory, watched=True),
        submit=lambda actor, task, attempt: actor.work.remote(task, attempt),
        listener=listener,
        size=size,
        shape=shape,
        max_attempts=engine.max_attempts,
        stalls=StallWatch(timeout_s, lambda actor: actor.steps.remote()) if timeout_s else None,
    )
    try:
        given_up = pool.run(_with_memory(config, items))
        listener.write_failures(force=True)
    finally:
        ray.kill(board)
    # Horizons of a method that is not nested are items of their own.
    return list({item.payload.rollout.path: item.payload.rollout for item in given_up}.values())


def _with_memory(config: RunConfig, items: Sequence[WorkItem[RolloutTask]]) -> list[WorkItem[RolloutTask]]:
    """Items with what their histories need of the host's memory."""
    methods = {name: resolve_method(section) for name, section in config.methods.items()}

    @cache
    def need(backbone: str, method: str, frames: int) -> int:
        return history_bytes(config.backbones[backbone], methods[method], frames)

    tasks = ((item, item.payload) for item in items)
    return [
        replace(item, memory=need(task.rollout.backbone, task.rollout.method, task.horizons[-1]))
        for item, task in tasks
    ]


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
        self._unwritten: list[FailureRecord] = []
        self._unwritten_since = 0.0
        self._write_after = 0.0

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

    def yielded(self, item: WorkItem[RolloutTask], worker: str, reason: str) -> None:
        self._progress(RolloutYielded(item.payload.rollout, worker, reason))

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
        self._progress(AttemptFailed(record))
        self._unwritten.append(record)
        self.write_failures()
        if failure.quarantined:
            self._advance()

    def worker_lost(self, worker: str, reason: str) -> None:
        self._progress(WorkerLost(worker, reason))

    def unplaced(self, seconds: float) -> None:
        self._progress(Notice(no_room(self._engine, seconds), warning=True))

    def too_large(self, item: WorkItem[RolloutTask], largest_node: float) -> None:
        rollout = item.payload.rollout
        text = (
            f"{rollout.path}: the history of this rollout grows to {item.memory / 1e9:.1f} GB of host memory, and the "
            f"largest node lets actors reserve {largest_node / 1e9:.1f} GB. Mend: nodes with more memory (or a larger "
            "--memory of `ray start`), shorter durations, or a method without a history"
        )
        if gets_no_larger(self._engine.address, usable_nodes(draining_nodes())):
            raise ClusterError(text)
        self._progress(Notice(f"{text}. It waits for a larger node", warning=True))

    def progress_of(self, item: WorkItem[RolloutTask]) -> int | None:
        rollout = item.payload.rollout
        try:
            return stored_pieces(self._run.inventory(rollout), rollout)
        except StorageError as error:
            self._progress(Notice(f"{rollout.path}: how far it is cannot be read: {error}", warning=True))
            return None

    def write_failures(self, *, force: bool = False) -> None:
        """Write what is not written down yet; StorageError once that fails for `UNWRITTEN_FOR_S`, or under `force`."""
        now = time.monotonic()
        if not self._unwritten or (now < self._write_after and not force):
            return
        try:
            while self._unwritten:
                self._run.record_failure(self._unwritten[0])
                del self._unwritten[0]
        except StorageError as error:
            self._unwritten_since = self._unwritten_since or now
            if force or now - self._unwritten_since > UNWRITTEN_FOR_S:
                raise
            self._write_after = now + _WRITE_AGAIN_S
            text = f"{len(self._unwritten)} failures are not written down yet: {error}"
            self._progress(Notice(text, warning=True))
        else:
            self._unwritten_since = 0.0

    def tick(self) -> None:
        self.write_failures()
        for worker, state in self._board.new_states().items():
            self._progress(RolloutAdvanced(state.rollout, worker, state.blocks, state.blocks_total, state.step))

    def _advance(self) -> None:
        self._done += 1
        self._progress(StageAdvanced("rollouts", self._done, self._total))

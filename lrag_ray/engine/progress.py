"""What a run tells while it works: events for whoever shows them, and the actor that workers tell their state.

Nothing here is needed for correctness: storage is the truth, and a lost message is only a number that is shown late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lrag_ray.store.records import FailureRecord, RolloutId

Stage = Literal["connect", "text", "rollouts", "decode", "scoring", "report"]
Step = Literal["loading", "replaying", "generating", "storing"]
"""What a worker is doing with a rollout."""

TELL_EVERY_S = 1.0
"""A worker tells its state at most so often."""


@dataclass(frozen=True)
class RunPlanned:
    """The run directory was read: what there is to do."""

    uri: str
    commits_total: int
    """Horizons of all rollouts of the configuration."""
    commits_done: int
    rollouts_to_do: int
    blocks_to_do: int
    """Upper bound: what stored parts save is not known yet."""


@dataclass(frozen=True)
class Notice:
    """Something a person should read."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class StageBegan:
    """A stage of the run began, with so many items."""

    stage: Stage
    total: int


@dataclass(frozen=True)
class StageAdvanced:
    """Items of the stage that are finished."""

    stage: Stage
    done: int
    total: int


@dataclass(frozen=True)
class StageEnded:
    """A stage ended."""

    stage: Stage
    seconds: float


@dataclass(frozen=True)
class RolloutStarted:
    """An attempt was sent to a worker."""

    rollout: RolloutId
    attempt: str
    worker: str


@dataclass(frozen=True)
class RolloutAdvanced:
    """A worker's state, about once a second."""

    rollout: RolloutId
    worker: str
    blocks: int
    blocks_total: int
    step: Step


@dataclass(frozen=True)
class RolloutFinished:
    """All missing horizons of a rollout are committed."""

    rollout: RolloutId
    horizons: tuple[int, ...]
    blocks_generated: int
    blocks_resumed: int
    """Blocks that were rebuilt from stored parts instead of being generated."""
    seconds: float


@dataclass(frozen=True)
class RolloutYielded:
    """A worker had to leave: what it did of the rollout is stored, and another worker goes on from there."""

    rollout: RolloutId
    worker: str
    reason: str


@dataclass(frozen=True)
class AttemptFailed:
    """An attempt failed; `failure` is what was stored."""

    failure: FailureRecord


@dataclass(frozen=True)
class VideosScored:
    """A wave beside the rollouts has scored so many videos."""

    videos: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker died and is being replaced."""

    worker: str
    reason: str


Event = (
    RunPlanned
    | Notice
    | StageBegan
    | StageAdvanced
    | StageEnded
    | RolloutStarted
    | RolloutAdvanced
    | RolloutFinished
    | RolloutYielded
    | AttemptFailed
    | VideosScored
    | WorkerLost
)

Progress = Callable[[Event], None]
"""Receives every event, in the driver's main thread."""


def silent(_: Event) -> None:
    """A `Progress` that shows nothing."""


class WorkerState(NamedTuple):
    """What a worker is at."""

    rollout: RolloutId
    blocks: int
    blocks_total: int
    step: Step


class ProgressBoard:
    """Latest state per worker; made into an actor by `start_board`."""

    def __init__(self) -> None:
        self._states: dict[str, WorkerState] = {}

    def tell(self, worker: str, state: WorkerState) -> None:
        """Replace the worker's state."""
        self._states[worker] = state

    def states(self) -> dict[str, WorkerState]:
        """States that were told since the last call."""
        told, self._states = self._states, {}
        return told


def start_board(name: str) -> Any:
    """Handle of the run's board: an actor that takes no CPU, lives on the driver's own node and dies with the driver.

    On another node it could be lost while the run goes on.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"name": name, "num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
    return ray.remote(ProgressBoard).options(**options).remote()


class BoardTeller:
    """A worker's side of the board: told at most once a second, never waited for."""

    def __init__(self, board: Any, worker: str) -> None:
        self._board = board
        self._worker = worker
        self._last_s = 0.0

    def __call__(self, state: WorkerState) -> None:
        """Tell the state, or drop it if the last one is not a second old."""
        now = time.monotonic()
        if now - self._last_s >= TELL_EVERY_S:
            self._last_s = now
            self._board.tell.options(num_returns=0).remote(self._worker, state)


class BoardReader:
    """The driver's side: asks at most once a second and never waits for the answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._last_s = 0.0
        self._asked: Any = None

    def new_states(self) -> dict[str, WorkerState]:
        """What workers told since the last answer; mostly empty."""
        now = time.monotonic()
        if self._asked is None:
            if now - self._last_s >= TELL_EVERY_S:
                self._last_s = now
                self._asked = self._board.states.remote()
            return {}
        done, _ = ray.wait([self._asked], timeout=0)
        if not done:
            return {}
        asked, self._asked = self._asked, None
        try:
            states: dict[str, WorkerState] = ray.get(asked)
        except ray.exceptions.RayActorError:
            # The board's node is gone. The run goes on unshown.
            return {}
        return states

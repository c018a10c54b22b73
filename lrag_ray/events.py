"""What a start reports while it works. Terminal, log and JSON are listeners.

Nothing here is needed for correctness: storage is the truth, and a lost event is only a number that is shown late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lrag_ray.store.records import FailureRecord, RolloutId

Stage = Literal["connect", "text", "rollouts", "decode", "scoring", "report"]
Step = Literal["loading", "replaying", "generating", "storing"]
"""What a worker is doing with a rollout."""


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

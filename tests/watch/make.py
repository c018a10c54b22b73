"""Events of a start, and a recorder of notices."""

from __future__ import annotations

from typing import Any

from lrag_ray.events import CellScored, Event, RunEnded, RunPlanned, StageBegan, StageEnded, TaskFinished, TaskStarted
from lrag_ray.stages.spec import Result

TITLE = "rollouts/tiny/rag/00000-aa-0"
CELL = CellScored("tiny", "rag", 4.5, 2, {"flicker": 0.25, "sharpness": 0.5}, 1.5)


def ended(**changes: Any) -> RunEnded:
    fields: dict[str, Any] = {
        "job": "evaluate", "uri": "runs/x", "state": "incomplete", "exit_code": 1, "seconds": 12.5, "missing": 1,
        "reasons": ("rollouts/tiny/rag/00001-bb-0: RuntimeError: no",), "error": None,
    }  # fmt: skip
    return RunEnded(**{**fields, **changes})


def start_of(rollouts: int = 2) -> list[Event]:
    """A start up to its report: one rollout of `rollouts` is finished."""
    return [
        RunPlanned("runs/x", 4, 0, rollouts, 12 * rollouts),
        StageBegan("rollouts", rollouts),
        TaskStarted("rollouts", TITLE, "a", "worker-0"),
        TaskFinished("rollouts", TITLE, Result(made=2, units=12, seconds=30, unit_seconds=1.5, stored_bytes=5000)),
        StageEnded("rollouts", 40.0),
        CELL,
    ]

"""The attempt ledger: what counts as an attempt, and when a task is quarantined. Shared by all ways of running tasks.

An exception of the task itself counts, unless the task was done together with others: any of them may be the cause. A
death of its worker counts only from the third in a row that brought no progress: a worker may be taken away for many
reasons that are not the task's fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrag_ray.engine.failures import Cause
from lrag_ray.stages.spec import StageName
from lrag_ray.store.records import FailureRecord, now_utc

BARREN_DEATHS = 3
"""Deaths in a row without progress from which on a death counts as an attempt."""


@dataclass
class _Attempts:
    counted: int = 0
    barren_deaths: int = 0
    progress: int = 0


class AttemptLedger:
    """Counts the attempts of a stage's tasks."""

    def __init__(self, stage: StageName, max_attempts: int) -> None:
        self._stage: StageName = stage
        self._max_attempts = max_attempts
        self._tasks: dict[str, _Attempts] = {}

    def start(self, key: str, progress: int) -> None:
        """A task is known, with this much progress."""
        self._tasks.setdefault(key, _Attempts(progress=progress))

    def failed(
        self,
        key: str,
        title: str,
        attempt: str,
        cause: Cause,
        progress: int | None = None,
        *,
        others: Sequence[str] = (),
    ) -> FailureRecord:
        """Count a failed attempt; `progress` is None where it cannot be read. `others` are the titles of tasks that
        were done together with it."""
        task = self._tasks.setdefault(key, _Attempts())
        raised = cause.raised
        if raised or (progress is not None and progress > task.progress):
            task.barren_deaths = 0
        elif progress is not None:
            task.barren_deaths += 1
        task.progress = max(progress or 0, task.progress)
        counted = (raised and not others) or task.barren_deaths >= BARREN_DEATHS
        together = f" (together with {', '.join(others)})" if others else ""
        task.counted += counted
        return FailureRecord(
            stage=self._stage,
            task=title,
            attempt=attempt,
            kind=cause.kind,
            counted=counted,
            counted_attempts=task.counted,
            quarantined=task.counted >= self._max_attempts,
            reason=f"{cause.reason}{together}",
            traceback=cause.traceback,
            created_at=now_utc(),
        )

    def is_barren(self, key: str) -> bool:
        """Whether the last attempt at a task was a death that brought no progress."""
        return self._tasks[key].barren_deaths > 0

    def refused(self, key: str, title: str, attempt: str, reason: str) -> FailureRecord:
        """A task that can never be done: no retry."""
        task = self._tasks.setdefault(key, _Attempts())
        task.counted += 1
        return FailureRecord(
            stage=self._stage,
            task=title,
            attempt=attempt,
            kind="refused",
            counted=True,
            counted_attempts=task.counted,
            quarantined=True,
            reason=reason,
            traceback="",
            created_at=now_utc(),
        )

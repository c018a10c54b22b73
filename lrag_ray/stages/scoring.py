"""Scoring as a stage: a thin adapter from a suite's worker to the stage contract."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from lrag_ray.scoring.suite import StoppedError, Suite, SuiteWorker, UnscorableError
from lrag_ray.stages.spec import Host, Outcome, Refused, Resources, Result, Stage, StageName, Task, Yielded
from lrag_ray.store.address import Storage


class ScoringStage(Stage[Any]):
    """Scores what a suite says is pending. Payloads are the suite's own."""

    name: ClassVar[StageName] = "scoring"

    def __init__(self, suite: Suite[Any], rows: Storage, videos: Storage | None, cpus: float, gpus: float) -> None:
        """Scores go to `rows`; videos come from `videos`, or from this machine's files where that is None.

        `cpus` and `gpus` are what each worker reserves; a suite that uses no GPU gets none.
        """
        self._suite = suite
        self._rows = rows
        self._videos = videos
        self._resources = Resources(cpus, gpus if suite.uses_gpu else 0)

    @property
    def resources(self) -> Resources:
        """As configured."""
        return self._resources

    def open(self, host: Host) -> ScoringWorker:
        """Set the suite up."""
        threads = max(1, int(self._resources.cpus))
        device = "cuda" if self._resources.gpus > 0 else "cpu"
        return ScoringWorker(self._suite.worker(self._rows, self._videos, threads=threads, device=device), host)

    def progress(self, task: Task[Any]) -> int:
        """How much of the task is stored."""
        return self._suite.progress(self._rows, task.payload)


class ScoringWorker:
    """Scores one payload at a time."""

    def __init__(self, worker: SuiteWorker, host: Host) -> None:
        self._worker = worker
        self._host = host

    def work(self, payload: Any, attempt: str) -> Outcome:
        """Score a payload."""
        began = time.perf_counter()
        try:
            self._worker.score(payload, lambda: not self._host.must_leave())
        except StoppedError:
            return Yielded("scoring was asked to stop; finished scores are stored")
        except UnscorableError as reason:
            return Refused(str(reason))
        return Result(seconds=time.perf_counter() - began)

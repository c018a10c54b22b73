"""Scoring by the configured suite: what is pending, how many workers, one wave.

`RunScoring.score` may be called during generation (from a thread of the driver, see `lrag_ray.pipelines.waves`)
and is called once more at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from lrag_ray.config.schema import ScoringSection, WorkersSection
from lrag_ray.engine.fan_out import FanOut
from lrag_ray.engine.sizing import WorkerShape, cannot_grow, draining_nodes, usable_nodes
from lrag_ray.errors import ClusterError
from lrag_ray.events import CellScored, Event, Listener, Notice, ReportWritten, silent
from lrag_ray.pipelines.costs import with_costs
from lrag_ray.report.build import Report
from lrag_ray.scoring.registry import suite_of
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import ScoringTask, Suite
from lrag_ray.stages.scoring import ScoringStage
from lrag_ray.stages.spec import Resources, Task
from lrag_ray.store.address import Storage
from lrag_ray.store.rollouts import RolloutRun


class RunScoring:
    """Scoring of a run."""

    def __init__(self, run: RolloutRun, scoring: ScoringSection, engine: WorkersSection) -> None:
        self.run = run
        self.suite = suite_of(scoring)
        """None where scoring is off."""
        self._scoring = scoring
        self._engine = engine

    def check(self, prompts: Mapping[str, str] | None = None) -> None:
        """WeightsError or ConfigError, before anything is computed, for what would keep the suite from scoring.

        `prompts` are those that the run will have, by the place where each is written.
        """
        if self.suite is not None:
            self.suite.check_prompts(prompts or {})
            self.suite.check_stored(self.run.storage)
            self.suite.check_weights()

    def refuse_without_room(self) -> None:
        """ClusterError where no scoring worker will ever find a place. Needs Ray."""
        if self.suite is not None:
            worker_count(self._stage(self.suite).resources, self._scoring, self._engine, silent)

    def resources(self) -> Resources:
        """What each worker reserves."""
        assert self.suite is not None, "nothing reserves resources where scoring is off"
        return self._stage(self.suite).resources

    def pending(self, *, settled: bool = False) -> list[Task[Any]]:
        """What is committed and not scored; with `settled` what no later commit of its rollout will replace.

        Raises StorageError if the run cannot be listed.
        """
        return as_tasks(self.suite.pending(self.run, settled=settled)) if self.suite is not None else []

    def score(
        self,
        tasks: Sequence[Task[Any]],
        listener: Listener = silent,
        *,
        most_workers: int | None = None,
        began: Callable[[FanOut[Any]], None] = lambda _: None,
    ) -> list[Task[Any]]:
        """Score `tasks`; returns the quarantined ones. Needs a running Ray; starts nothing without work.

        `began` receives what can be stopped. Raises ClusterError where no node has room for a worker.
        """
        if self.suite is None:
            return []
        suite, stage = self.suite, self._stage(self.suite)
        shown = with_costs(listener, lambda: suite.spent(self.run.storage))
        failed = score_tasks(stage, tasks, self._scoring, self._engine, shown, most_workers=most_workers, began=began)
        if tasks and (cost := suite.spent(self.run.storage)):
            listener(Notice(cost))
        return failed

    def set_aside_damaged(self, damaged: Collection[str], listener: Listener = silent) -> dict[str, str]:
        """Rename score files of the suite that cannot be read, so that the next start scores their videos again.

        Reports each, and returns what was reported by path.
        """
        suite = self.suite
        if suite is None:
            return {}
        found = {path: "it cannot be read" for path in damaged if path.startswith(f"{suite.folder}/")}
        if found:
            behind = suite.files_behind(self.run, found) - found.keys()
            found |= dict.fromkeys(behind, "another file of the same video cannot be read")
        for path, reason in found.items():
            found[path] = f"{reason}; kept as {self.run.set_aside(path)}, and the same command scores what is missing"
            listener(Notice(f"{path}: {found[path]}", warning=True))
        return found

    def missing(self, shown: Suite[Any], scores: Scores, listener: Listener = silent) -> dict[str, str]:
        """What a report of the suite `shown` finds missing of this one's `scores`, with the reason, by path.

        Score files that cannot be read are set aside.
        """
        if self.suite is None or shown.folder != self.suite.folder:
            return {}
        return scores.failures | self.set_aside_damaged(scores.damaged, listener)

    def _stage(self, suite: Suite[Any]) -> ScoringStage:
        return scoring_stage(suite, self.run.storage, self.run.storage, self._scoring)


def report_events(report: Report) -> Iterator[Event]:
    """What a written report says, as events: one per cell with scores, then where it is."""
    for block in report.blocks:
        for row in block.rows:
            if row.means:
                yield CellScored(
                    backbone=block.backbone,
                    method=row.method,
                    duration_s=report.data.duration_s(block.backbone, block.latent_frames),
                    prompts=row.prompts,
                    means=dict(row.means),
                    average_rank=row.average_rank,
                )
    if report.folder is not None:
        yield ReportWritten(report.folder, tuple(report.files))


def scoring_stage(suite: Suite[Any], rows: Storage, videos: Storage | None, scoring: ScoringSection) -> ScoringStage:
    """The stage with the resources of the configuration."""
    return ScoringStage(suite, rows, videos, scoring.cpus_per_worker, scoring.gpus_per_worker)


def as_tasks(pending: Sequence[ScoringTask]) -> list[Task[Any]]:
    """What a suite says is pending, as tasks of the stage."""
    return [Task(key=task.name, payload=task.payload, order=order) for order, task in enumerate(pending)]


def score_tasks(
    stage: ScoringStage,
    tasks: Sequence[Task[Any]],
    scoring: ScoringSection,
    engine: WorkersSection,
    listener: Listener,
    *,
    most_workers: int | None = None,
    began: Callable[[FanOut[Any]], None] = lambda _: None,
) -> list[Task[Any]]:
    """One fan-out over `tasks`; see `RunScoring.score`."""
    if not tasks:
        return []
    count = worker_count(stage.resources, scoring, engine, listener)
    workers = min(count, len(tasks), most_workers or count)
    fan_out = FanOut(stage, workers, max_attempts=engine.max_attempts, listener=listener)
    began(fan_out)
    return fan_out.run(tasks)


def worker_count(each: Resources, scoring: ScoringSection, engine: WorkersSection, listener: Listener) -> int:
    """How many workers to have: what the configuration says, otherwise as many as fit the cluster. Needs Ray.

    Raises ClusterError where not one fits and no node can join; where one can, that is reported and waited for.
    """
    shape, nodes = WorkerShape(*each), usable_nodes(draining_nodes())
    fit = sum(map(shape.slots, nodes))
    if fit == 0:
        text = (
            f"no node has room for a scoring worker of {each.cpus:g} CPUs and {each.gpus:g} GPUs "
            "(scoring.cpus_per_worker, scoring.gpus_per_worker)"
        )
        if cannot_grow(engine.address, nodes):
            raise ClusterError(f"{text}, and this machine cannot scale up. Set them to what it has")
        listener(Notice(f"{text}. Waiting for one", warning=True))
    return scoring.workers or max(1, fit)

"""One wave of scoring over a run, whatever the suite.

`score_pending` may be called while generation goes on (from a thread of the driver, with a `Wave`) and is called once
more at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from functools import partial

from lrag_ray.config.schema import EngineSection, RunConfig, ScoringSection
from lrag_ray.engine.fan_out import FanOut, Item, Work, Workers
from lrag_ray.engine.sizing import WorkerShape, cannot_grow, draining_nodes, usable_nodes
from lrag_ray.errors import ClusterError
from lrag_ray.events import Listener, Notice, StageAdvanced, silent
from lrag_ray.scoring.preview import worker as preview
from lrag_ray.scoring.preview.measures import PREVIEW
from lrag_ray.scoring.vbench_long import pending as vbench
from lrag_ray.scoring.vbench_long.parquet import folder
from lrag_ray.scoring.vbench_long.worker import VbenchWork
from lrag_ray.store.rollouts import RolloutRun


@dataclass(frozen=True)
class ScoringOutcome:
    """What one wave did."""

    scored: int
    """Videos that got values."""
    failures: dict[str, str]
    """Reason by video, for broken ones (recorded) and for other trouble (tried again in the next wave)."""


@dataclass(frozen=True)
class Wave:
    """A wave beside rollouts: small, on what they leave free, and stopped when they are done."""

    workers: int
    """At most so many."""
    videos: int
    """At most so many."""
    began: Callable[[FanOut], None]
    """Told what to stop."""
    without: Container[str] = ()
    """Items, by key, that it leaves to the last wave."""


def check_scoring(run_dir: RolloutRun, config: RunConfig) -> None:
    """WeightsError or ConfigError, before anything is computed, for what would keep the suite from scoring."""
    if config.scoring.suite == "vbench_long":
        vbench.refuse_mixture(run_dir.storage, folder(config.scoring.mode), config.scoring)
        vbench.check_weights(config.scoring)


def refuse_without_room(config: RunConfig) -> None:
    """ClusterError where no scoring worker will ever find a place. Needs Ray."""
    if config.scoring.suite != "none":
        worker_count(config.scoring, config.engine, silent)


def pending_scores(run_dir: RolloutRun, config: RunConfig, *, settled: bool = False) -> Sequence[Item]:
    """What is committed and not scored; with `settled` what no later commit of its rollout will replace.

    Raises StorageError if the run cannot be listed.
    """
    match config.scoring.suite:
        case "none":
            return []
        case "preview":
            return preview.pending_items(run_dir)
        case "vbench_long":
            return vbench.pending_items(run_dir, config, settled=settled)


def set_aside_damaged(
    run_dir: RolloutRun, config: RunConfig, damaged: Collection[str], progress: Listener = silent
) -> dict[str, str]:
    """Rename score files of the configured suite that cannot be read, so that the next start scores their videos again.

    Says so of each, and returns it by path.
    """
    is_vbench = config.scoring.suite == "vbench_long"
    place = folder(config.scoring.mode) if is_vbench else PREVIEW.folder
    told = {path: "it cannot be read" for path in damaged if path.startswith(f"{place}/")}
    if told and is_vbench:
        behind = vbench.files_behind(run_dir, config, told) - told.keys()
        told |= dict.fromkeys(behind, "another file of the same video cannot be read")
    for path, reason in told.items():
        told[path] = f"{reason}; kept as {run_dir.set_aside(path)}, and the same command scores what is missing"
        progress(Notice(f"{path}: {told[path]}", warning=True))
    return told


def score_pending(
    run_dir: RolloutRun,
    config: RunConfig,
    progress: Listener = silent,
    *,
    items: Sequence[Item] | None = None,
    wave: Wave | None = None,
) -> ScoringOutcome:
    """Score `items`, or everything that is pending. Needs a running Ray; starts nothing without work.

    Raises:
        StorageError: the run cannot be listed. Trouble with a single video is in the outcome instead.
        ClusterError: no node of this machine's cluster has room for a worker.
    """
    if items is None:
        items = pending_scores(run_dir, config, settled=wave is not None)
    if wave is not None:
        items = [item for item in items if item.key not in wave.without][: wave.videos]
    if not items:
        return ScoringOutcome(0, {})
    count = worker_count(config.scoring, config.engine, progress)
    workers = each_worker(config.scoring, min(count, len(items), wave.workers if wave else count))
    fan_out = FanOut(items, _maker(run_dir, config), workers, keep=config.scoring.suite == "vbench_long")
    if wave is not None:
        wave.began(fan_out)
    return collect(fan_out, len(items), progress)


def collect(fan_out: FanOut, total: int, progress: Listener) -> ScoringOutcome:
    """Iterate to the end."""
    scored, failures = 0, {}
    for done, result in enumerate(fan_out, start=1):
        scored += result.state == "scored"
        if result.state == "failed":
            failures[result.key] = result.reason
        progress(StageAdvanced("scoring", done, total))
    return ScoringOutcome(scored, failures)


def worker_count(scoring: ScoringSection, engine: EngineSection, progress: Listener) -> int:
    """How many workers to have: what the configuration says, else as many as fit the cluster. Needs Ray.

    Raises ClusterError where not one fits and no node can join; where one can, that is told and waited for.
    """
    each = each_worker(scoring)
    shape, nodes = WorkerShape(each.cpus, each.gpus), usable_nodes(draining_nodes())
    fit = sum(map(shape.slots, nodes))
    if fit == 0:
        text = (
            f"no node has room for a scoring worker of {each.cpus:g} CPUs and {each.gpus:g} GPUs "
            "(scoring.cpus_per_worker, scoring.gpus_per_worker)"
        )
        if cannot_grow(engine.address, nodes):
            raise ClusterError(f"{text}, and this machine gets no larger. Set them to what it has")
        progress(Notice(f"{text}. Waiting for one", warning=True))
    return scoring.workers or max(1, fit)


def each_worker(scoring: ScoringSection, count: int = 1) -> Workers:
    """What one worker reserves: the preview suite knows no GPU."""
    return Workers(count, scoring.cpus_per_worker, scoring.gpus_per_worker if scoring.suite == "vbench_long" else 0)


def _maker(run_dir: RolloutRun, config: RunConfig) -> Callable[[], Work]:
    if config.scoring.suite == "vbench_long":
        return partial(VbenchWork, run_dir.storage, run_dir.storage, config.scoring)
    return partial(preview.PreviewWork, run_dir.storage)

"""One wave of scoring over a run, whatever the suite.

`score_pending` may be called while generation goes on (from a thread of the driver, with a `Wave`) and is called once
more at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lrag_ray.config.schema import RunConfig, ScoringSection
from lrag_ray.engine.scoring import preview, vbench
from lrag_ray.engine.scoring.fan_out import FanOut, Item, Work, Workers, room_for
from lrag_ray.engine.scoring.vbench_work import VbenchWork
from lrag_ray.errors import ClusterError
from lrag_ray.scoring.vbench_long.parquet import folder
from lrag_ray.store.run_dir import RunDirectory

Progress = Callable[[int, int], None]
"""Called with (videos done, videos of this wave)."""


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


def check_scoring(run_dir: RunDirectory, config: RunConfig) -> None:
    """WeightsError or ConfigError, before anything is computed, for what would keep the suite from scoring."""
    if config.scoring.suite == "vbench_long":
        vbench.refuse_mixture(run_dir.storage, folder(config.scoring.mode), config.scoring)
        vbench.check_weights(config.scoring)


def open_scores(run_dir: RunDirectory, config: RunConfig) -> int:
    """How many videos the next call of `score_pending` would begin with. StorageError if the run cannot be listed."""
    return len(_pending(run_dir, config, settled=False))


def score_pending(
    run_dir: RunDirectory, config: RunConfig, progress: Progress | None = None, *, wave: Wave | None = None
) -> ScoringOutcome:
    """Score every committed video that has no score yet. Needs a running Ray; starts nothing without work.

    Raises:
        StorageError: the run cannot be listed. Trouble with a single video is in the outcome instead.
        ClusterError: no node of the cluster has room for a worker.
    """
    items = _pending(run_dir, config, settled=wave is not None)
    if wave is not None:
        items = [item for item in items if item.key not in wave.without][: wave.videos]
    if not items:
        return ScoringOutcome(0, {})
    workers = worker_count(config.scoring, len(items), wave.workers if wave else None)
    keep = config.scoring.suite == "vbench_long"
    fan_out = FanOut(items, _maker(run_dir, config), workers, keep=keep)
    if wave is not None:
        wave.began(fan_out)
    return collect(fan_out, len(items), progress)


def collect(fan_out: FanOut, total: int, progress: Progress | None) -> ScoringOutcome:
    """Iterate to the end."""
    scored, failures = 0, {}
    for done, result in enumerate(fan_out, start=1):
        scored += result.state == "scored"
        if result.state == "failed":
            failures[result.key] = result.reason
        if progress is not None:
            progress(done, total)
    return ScoringOutcome(scored, failures)


def worker_count(scoring: ScoringSection, items: int, most: int | None = None) -> Workers:
    """How many workers for so many items; as many as fit the whole cluster where neither the user nor `most` says.

    Raises ClusterError where not one fits a node. Needs Ray.
    """
    import ray

    workers = each_worker(scoring)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = sum(room_for(workers, node) for node in nodes)
    if fit == 0:
        room = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        raise ClusterError(
            f"no node has room for a scoring worker of {workers.cpus:g} CPUs and {workers.gpus:g} GPUs; the whole "
            f"cluster has {room}. Set scoring.cpus_per_worker and scoring.gpus_per_worker to what a node has"
        )
    count = min(limit for limit in (scoring.workers or fit, most, items) if limit is not None)
    return replace(workers, count=count)


def each_worker(scoring: ScoringSection) -> Workers:
    """What one worker reserves: the preview suite knows no GPU."""
    return Workers(1, scoring.cpus_per_worker, scoring.gpus_per_worker if scoring.suite == "vbench_long" else 0)


def _pending(run_dir: RunDirectory, config: RunConfig, *, settled: bool) -> Sequence[Item]:
    match config.scoring.suite:
        case "none":
            return []
        case "preview":
            return preview.pending_items(run_dir)
        case "vbench_long":
            return vbench.pending_items(run_dir, config, settled=settled)


def _maker(run_dir: RunDirectory, config: RunConfig) -> Callable[[], Work]:
    if config.scoring.suite == "vbench_long":
        return partial(VbenchWork, run_dir.storage, run_dir.storage, config.scoring)
    return partial(preview.PreviewWork, run_dir.storage)

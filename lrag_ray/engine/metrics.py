"""Prometheus metrics of a run, exported by Ray: a listener in the driver.

Ray prefixes the names with ``ray_`` and serves them on the metrics port of the driver's node. Tags are few: backbone
and method, a state, a dimension; never a prompt or a rollout. Counters are those of one start.

=========================== ========= ============================================== ==================================
name                        kind      tags                                           meaning
=========================== ========= ============================================== ==================================
lrag_blocks_total           counter   backbone, method                               blocks of finished rollouts that
                                                                                     this start generated
lrag_block_seconds          histogram backbone, method                               mean time of a block, per rollout
lrag_blocks_done            gauge                                                    blocks, those under way included
lrag_blocks_planned         gauge                                                    blocks to do
lrag_rollouts               gauge     state: open, running, done, failed             rollouts of this start
lrag_failed_attempts_total  counter   stage, kind                                    failed attempts
lrag_stored_bytes_total     counter   stage                                          bytes stored by finished tasks
lrag_videos_scored_total    counter                                                  videos scored
lrag_score                  gauge     backbone, method, duration_s, dimension        mean score of a cell
=========================== ========= ============================================== ==================================
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from lrag_ray.events import AttemptFailed, CellScored, Event, ReportWritten, TaskFinished
from lrag_ray.store.records import RolloutId
from lrag_ray.watch.tally import Tally

BLOCK_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]
"""Bounds of the histogram: a block takes 1 to 8 s on current data-centre GPUs."""
_GAUGES_EVERY_S = 1.0


class RunMetrics:
    """Turns events into metrics while Ray is connected; before and after, events only count for the gauges."""

    def __init__(self, linger_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`linger_s`: how long to wait after the report; Ray drops the gauges of a driver that is gone."""
        self._linger_s = linger_s
        self._clock = clock
        self._tally = Tally()
        self._metrics: _Metrics | None = None
        self._gauges_after_s = 0.0

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        self._tally.count(event)
        if not ray.is_initialized():
            return
        if self._metrics is None:
            self._metrics = _Metrics()
        metrics = self._metrics
        match event:
            case TaskFinished():
                _count(metrics.stored_bytes, event.result.stored_bytes, stage=event.stage)
                if event.stage == "scoring":
                    _count(metrics.videos_scored, event.result.made)
                elif (rollout := RolloutId.at(event.task)) is not None and event.stage == "rollouts":
                    cell = {"backbone": rollout.backbone, "method": rollout.method}
                    _count(metrics.blocks, getattr(event.result, "blocks_generated", event.result.units), **cell)
                    if event.result.unit_seconds > 0:
                        metrics.block_seconds.observe(event.result.unit_seconds, tags=cell)
            case AttemptFailed(failure):
                _count(metrics.failed_attempts, 1, stage=failure.stage, kind=failure.kind)
            case CellScored():
                cell = {"backbone": event.backbone, "method": event.method, "duration_s": f"{event.duration_s:g}"}
                for dimension, value in event.means.items():
                    metrics.score.set(value, tags={**cell, "dimension": dimension})
        if self._clock() >= self._gauges_after_s or isinstance(event, TaskFinished | ReportWritten):
            self._gauges_after_s = self._clock() + _GAUGES_EVERY_S
            self._set_gauges(metrics)
        if isinstance(event, ReportWritten):
            # Ctrl-C ends the wait alone: everything is made.
            with suppress(KeyboardInterrupt):
                time.sleep(self._linger_s)

    def _set_gauges(self, metrics: _Metrics) -> None:
        tally = self._tally
        running = len(tally.flights) if tally.stage == "rollouts" else 0
        states = {"running": running, "done": tally.rollouts_done, "failed": tally.rollouts_quarantined}
        states["open"] = max(0, tally.rollouts_total - sum(states.values()))
        for state, value in states.items():
            metrics.rollouts.set(value, tags={"state": state})
        metrics.blocks_done.set(tally.blocks_done)
        metrics.blocks_planned.set(tally.blocks_total)


class _Metrics:
    """The metrics themselves; they need a connected Ray."""

    def __init__(self) -> None:
        cell = ("backbone", "method")
        self.blocks = Counter("lrag_blocks_total", "Blocks that this start generated", cell)
        self.block_seconds = Histogram(
            "lrag_block_seconds", "Mean seconds of a block, per rollout", BLOCK_SECONDS, cell
        )
        self.blocks_done = Gauge("lrag_blocks_done", "Blocks done, those under way included")
        self.blocks_planned = Gauge("lrag_blocks_planned", "Blocks to do")
        self.rollouts = Gauge("lrag_rollouts", "Rollouts of this start by state", ("state",))
        self.failed_attempts = Counter("lrag_failed_attempts_total", "Failed attempts", ("stage", "kind"))
        self.stored_bytes = Counter("lrag_stored_bytes_total", "Bytes stored by finished tasks", ("stage",))
        self.videos_scored = Counter("lrag_videos_scored_total", "Videos scored")
        self.score = Gauge("lrag_score", "Mean score of a cell", (*cell, "duration_s", "dimension"))


def _count(counter: Any, value: float, **tags: str) -> None:
    # Ray refuses 0.
    if value > 0:
        counter.inc(value, tags=tags)

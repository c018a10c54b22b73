"""Scoring beside the rollouts: waves from a thread of the driver, on what no rollout needs.

A wave is begun only for room that is free now and that no rollout actor, lost or busy a moment ago, would want back. It
is small, and it stops within a clip when the rollouts are done, so that the last wave has the whole cluster. What a
wave cannot do is left to the last one: nothing that happens here ends the run.

Example::

    with scoring_waves(run, config.scoring, config.engine, listener) as relay:
        job.run_stage(rollouts, tasks, listener=relay)
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from lrag_ray.config.redaction import redact
from lrag_ray.config.schema import ScoringSection, WorkersSection
from lrag_ray.engine.fan_out import FanOut, room_for
from lrag_ray.errors import LragError
from lrag_ray.events import (
    AttemptFailed,
    Event,
    Listener,
    Notice,
    StageAdvanced,
    TaskFinished,
    TaskStarted,
    TaskYielded,
    WorkerLost,
)
from lrag_ray.pipelines.scoring import RunScoring
from lrag_ray.scoring.registry import NONE
from lrag_ray.store.rollouts import RolloutRun

FIRST_AFTER_S = 30.0
"""From the first rollout that began: by then the others have their places."""
EVERY_S = 30.0
"""Least time between the end of a wave and the next."""
_LISTING_SHARE = 0.1
"""Share of its time that the thread may spend on finding what can be scored."""
_VIDEOS_PER_WORKER = 4
_HALT_WITHIN_S = 10.0


@contextmanager
def scoring_waves(
    run: RolloutRun, scoring: ScoringSection, engine: WorkersSection, listener: Listener
) -> Iterator[Listener]:
    """Score in the background for the time of the block; the yielded listener must get the events of the rollouts.

    It passes them on, after what waves have to report: `listener` is called in the caller's thread only.
    """
    if scoring.suite == NONE or not scoring.during_generation:
        yield listener
        return
    # A client of its own: the driver's is used by the driver's thread meanwhile.
    own_run = RolloutRun(run.storage.address, run.storage.options)
    background = _BackgroundScoring(RunScoring(own_run, scoring, engine), engine, listener)
    background.start()
    try:
        yield background.relay
    except BaseException:
        background.stop(_HALT_WITHIN_S)
        raise
    background.stop(None)


class RolloutWatch:
    """What the rollout stage holds, from its events."""

    def __init__(self) -> None:
        self._busy: dict[str, str] = {}
        self._most_busy = 0
        self._open: int | None = None
        self.began_s: float | None = None
        """When the first rollout began."""
        self.finished = 0
        """Rollouts that ended well."""

    def take(self, event: Event) -> None:
        """Take an event in."""
        match event:
            case TaskStarted():
                self.began_s = self.began_s or time.monotonic()
                # What is done together shares a worker, and ends together.
                self._busy[event.worker.partition("+")[0]] = event.task
                self._most_busy = max(self._most_busy, len(self._busy))
            case TaskFinished(task=task):
                self.finished += 1
                self._land(task)
            case AttemptFailed(failure):
                self._land(failure.task)
            case TaskYielded() | WorkerLost():
                self._busy.pop(event.worker.partition("+")[0], None)
            case StageAdvanced(stage="rollouts"):
                self._open = event.total - event.done

    @property
    def absent(self) -> int:
        """Actors that have worked at one time, do not now, and would have something to do."""
        wanted = self._most_busy if self._open is None else min(self._most_busy, self._open)
        return max(0, wanted - len(self._busy))

    def _land(self, task: str) -> None:
        self._busy = {worker: at for worker, at in self._busy.items() if at != task}


class _BackgroundScoring:
    """The thread that begins waves."""

    def __init__(self, scoring: RunScoring, engine: WorkersSection, listener: Listener) -> None:
        self._scoring = scoring
        self._engine = engine
        self._listener = listener
        self._watch = RolloutWatch()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._fan_out: FanOut[Any] | None = None
        self._failed: set[str] = set()
        """Tasks that are left to the last wave."""
        self._ended = 0
        """Tasks that the present wave has finished or that were quarantined in it."""
        self._reported: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="scoring-waves", daemon=True)

    def start(self) -> None:
        """Begin to look for work."""
        self._thread.start()

    def relay(self, event: Event) -> None:
        """Pass on what waves have to report, then `event`."""
        self._drain()
        self._watch.take(event)
        self._listener(event)

    def stop(self, within_s: float | None) -> None:
        """End the current wave; wait for its end, or only for this long."""
        self._stopped.set()
        if self._fan_out is not None:
            self._fan_out.stop()
        self._thread.join(within_s)
        self._drain()

    def _drain(self) -> None:
        while not self._events.empty():
            self._listener(self._events.get())

    def _work(self) -> None:
        next_s, seen, workers, videos = 0.0, -1, 0, 0
        while not self._stopped.wait(min(1.0, EVERY_S)):
            now, watch = time.monotonic(), self._watch
            if watch.began_s is None or now < max(watch.began_s + FIRST_AFTER_S, next_s) or watch.finished == seen:
                continue
            finished = watch.finished
            try:
                workers = self._free_workers()
                videos = workers * _VIDEOS_PER_WORKER
                done = self._wave(workers, videos) if workers else 0
            except LragError as error:
                self._warn(f"videos cannot be scored yet: {error}")
                done = 0
            except Exception as error:  # noqa: BLE001 - reported; the last wave meets it again, where it ends the run
                self._warn(redact(f"scoring beside the rollouts has ended: {type(error).__name__}: {error}"))
                return
            if workers and done < videos:
                # Nothing is left until another rollout is finished; a full wave has left some.
                seen = finished
            spent_s = time.monotonic() - now
            next_s = time.monotonic() + (EVERY_S if done else max(EVERY_S, spent_s / _LISTING_SHARE))

    def _wave(self, workers: int, videos: int) -> int:
        tasks = [task for task in self._scoring.pending(settled=True) if task.title not in self._failed][:videos]
        self._ended = 0
        self._scoring.score(tasks, self._pass_on, most_workers=workers, began=self._began)
        self._fan_out = None
        return self._ended

    def _pass_on(self, event: Event) -> None:
        # How far a wave is would be taken for how far the rollouts are, and its workers for rollout workers.
        match event:
            case Notice():
                self._warn(event.text)
            case TaskFinished():
                self._ended += 1
                self._events.put(event)
            case AttemptFailed(failure):
                if failure.quarantined:
                    self._ended += 1
                    self._failed.add(failure.task)
                self._events.put(event)

    def _began(self, fan_out: FanOut[Any]) -> None:
        self._fan_out = fan_out
        if self._stopped.is_set():
            fan_out.stop()

    def _free_workers(self) -> int:
        engine, absent = self._engine, self._watch.absent
        free = dict(ray.available_resources())
        for name, each in (("CPU", engine.cpus_per_actor), ("GPU", engine.gpus_per_actor)):
            free[name] = free.get(name, 0) - absent * each
        return room_for(self._scoring.resources(), free)

    def _warn(self, text: str) -> None:
        if not self._stopped.is_set() and text not in self._reported:
            self._reported.add(text)
            self._events.put(Notice(text, warning=True))

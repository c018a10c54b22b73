"""How busy the actor pool keeps its actors: rollouts are replaced by sleeps, everything else is real.

Example::

    print(json.dumps(bench_runner(items=1000, actors=8, seconds=0.25).as_dict()))
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from lrag_ray.engine.oom import Place, this_place

if TYPE_CHECKING:
    # Imported by every actor of the benchmark: it needs none of this.
    from lrag_ray.engine.pool import AttemptFailure
    from lrag_ray.engine.queue import WorkItem


class Span(NamedTuple):
    """What an actor did with an item, in seconds since 1970."""

    actor: str
    began: float
    ended: float


class SleepingActor:
    """Sleeps where a rollout actor works."""

    def __init__(self, name: str) -> None:
        self._name = name

    def ready(self) -> Place:
        """The actor is ready at once."""
        return this_place()

    def work(self, seconds: float, attempt: str) -> Span:
        """Be busy for so long."""
        began = time.time()
        time.sleep(seconds)
        return Span(self._name, began, time.time())


@dataclass(frozen=True)
class RunnerSpeed:
    """What was measured."""

    items: int
    actors: int
    seconds_per_item: float
    busy_share: float
    """Time in which actors worked, of actors times the time from the first item's begin to the last one's end."""
    busy_share_of_started: float
    """The same, an actor's time counted from its own first item on: without the start of the actors."""
    items_per_s: float
    dispatch_ms: dict[str, float]
    """Between the end of an item and the begin of the next on the same actor: percentiles in milliseconds."""
    starting_s: float
    """From the first actor's first item to the last actor's first item."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench_runner(*, items: int, actors: int, seconds: float, address: str | None = None) -> RunnerSpeed:
    """Send `items` sleeps of `seconds` through the pool on `actors` actors of a running or a local Ray cluster.

    Raises ClusterError.
    """
    import ray

    from lrag_ray.config.schema import EngineSection
    from lrag_ray.engine.pool import ActorPool
    from lrag_ray.engine.queue import WorkItem
    from lrag_ray.engine.session import ray_session
    from lrag_ray.engine.sizing import PoolSize, WorkerShape

    # Sleepers share the CPUs that there are.
    share = 0.001
    work = [WorkItem(f"item-{number:06d}", number, "sleep", seconds) for number in range(items)]
    listener = _Spans()
    actor = ray.remote(num_cpus=share, max_restarts=0, max_task_retries=0)(SleepingActor)
    pool: ActorPool[float, Span] = ActorPool(
        spawn=lambda name, memory: actor.remote(name),
        submit=lambda handle, payload, attempt: handle.work.remote(payload, attempt),
        listener=listener,
        size=PoolSize(actors, actors),
        shape=WorkerShape(share, 0),
        max_attempts=3,
    )
    with ray_session(EngineSection(address=address)):
        pool.run(work)
    return _speed(listener.spans, actors, seconds)


def _speed(spans: list[Span], actors: int, seconds: float) -> RunnerSpeed:
    import numpy as np

    by_actor: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began):
        by_actor[span.actor].append(span)
    firsts = [own[0].began for own in by_actor.values()]
    end = max(span.ended for span in spans)
    busy = sum(span.ended - span.began for span in spans)
    pauses = [after.began - before.ended for own in by_actor.values() for before, after in pairwise(own)]
    percentiles = np.percentile(np.array(pauses or [0.0]) * 1000, [50, 90, 99, 100])
    return RunnerSpeed(
        items=len(spans),
        actors=actors,
        seconds_per_item=seconds,
        busy_share=round(busy / (actors * (end - min(firsts))), 4),
        busy_share_of_started=round(busy / sum(end - first for first in firsts), 4),
        items_per_s=round(len(spans) / (end - min(firsts)), 2),
        dispatch_ms={
            name: round(float(value), 2) for name, value in zip(("p50", "p90", "p99", "max"), percentiles, strict=True)
        },
        starting_s=round(max(firsts) - min(firsts), 3),
    )


class _Spans:
    """A listener that keeps what the actors tell of themselves."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def started(self, item: WorkItem[float], attempt: str, worker: str) -> None:
        pass

    def finished(self, item: WorkItem[float], result: Span) -> None:
        self.spans.append(result)

    def yielded(self, item: WorkItem[float], worker: str, reason: str) -> None:
        pass

    def failed(self, item: WorkItem[float], attempt: str, failure: AttemptFailure) -> None:
        pass

    def worker_lost(self, worker: str, reason: str) -> None:
        pass

    def unplaced(self, seconds: float) -> None:
        pass

    def too_large(self, item: WorkItem[float], largest_node: float) -> None:
        pass

    def progress_of(self, item: WorkItem[float]) -> int:
        return 0

    def tick(self) -> None:
        pass

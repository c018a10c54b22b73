"""How busy the actor pool keeps its actors: rollouts are replaced by sleeps, everything else is real.

Example::

    print(json.dumps(bench_runner(items=1000, actors=8, seconds=0.25).as_dict()))
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lrag_ray.stages.spec import Host, Resources, Result, Stage

if TYPE_CHECKING:
    # Every actor of the benchmark imports this module and needs none of it.
    from lrag_ray.events import Event


@dataclass(frozen=True)
class Slept(Result):
    """What an actor did with a task, in seconds since 1970."""

    actor: str = ""
    began: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class SleepStage(Stage[float]):
    """Sleeps where a rollout worker works."""

    name = "rollouts"
    cpus: float = 0.001
    """Sleepers share the CPUs that there are."""

    @property
    def resources(self) -> Resources:
        """Next to nothing."""
        return Resources(self.cpus)

    def open(self, host: Host) -> Sleeper:
        """Ready at once."""
        return Sleeper(host.name)


class Sleeper:
    """Does nothing for a while."""

    def __init__(self, name: str) -> None:
        self._name = name

    def work(self, payload: float, attempt: str) -> Slept:
        """Be busy for `payload` seconds."""
        began = time.time()
        time.sleep(payload)
        return Slept(actor=self._name, began=began, ended=time.time())


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
    from lrag_ray.config.schema import EngineSection
    from lrag_ray.engine.pool import ActorPool
    from lrag_ray.engine.session import ray_session
    from lrag_ray.engine.sizing import PoolSize
    from lrag_ray.events import TaskFinished
    from lrag_ray.stages.spec import Task

    tasks = [Task(f"item-{number:06d}", seconds, number) for number in range(items)]
    spans: list[Slept] = []

    def listener(event: Event) -> None:
        if isinstance(event, TaskFinished) and isinstance(event.result, Slept):
            spans.append(event.result)

    with ray_session(EngineSection(address=address)):
        ActorPool(SleepStage(), PoolSize(actors, actors), listener=listener).run(tasks)
    return _speed(spans, actors, seconds)


def _speed(spans: list[Slept], actors: int, seconds: float) -> RunnerSpeed:
    import numpy as np

    by_actor: dict[str, list[Slept]] = defaultdict(list)
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

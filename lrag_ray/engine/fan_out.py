"""Items through Ray Data to workers: each once at a time, none waiting behind another, poison put aside.

Ray Data by itself tries an item whose worker dies again for ever. A foreman (an actor that takes no CPU) counts how
often each item was begun, and a worker that is handed one for the fourth time gives it up unread.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lrag_ray.config.redaction import redact
from lrag_ray.errors import ClusterError, LragError

ATTEMPTS = 3
"""Times that an item is begun before it is given up."""


class Item(NamedTuple):
    """Something to score."""

    key: str
    """What people call it; unique within a wave."""
    payload: Any
    """What the worker is handed."""


class Result(NamedTuple):
    """What became of an item."""

    key: str
    state: Literal["scored", "failed", "stopped"]
    reason: str
    """Why it failed, or empty."""


class Refused(Exception):  # noqa: N818 - a result, no error of the program
    """Raised by a worker: this item cannot be scored, for this reason."""


class Stopped(Exception):  # noqa: N818 - a result, no error of the program
    """Raised by a worker that was told to stop before the item was done."""


GoOn = Callable[[], bool]
"""Whether a worker should go on; asked between the clips of a video."""
Work = Callable[[Any, GoOn], None]
"""Scores one payload and commits what it gives; ends early with Stopped where it should not go on."""


@dataclass(frozen=True)
class Workers:
    """How many workers, and what each reserves."""

    count: int
    cpus: float
    gpus: float = 0


def room_for(workers: Workers, resources: Mapping[str, float]) -> int:
    """How many such workers fit `resources` (CPU and GPU of a node, or of what is free)."""
    cpus = resources.get("CPU", 0) / workers.cpus
    gpus = resources.get("GPU", 0) / workers.gpus if workers.gpus else cpus
    # Sums of shares such as 0.1 fall short of a whole by a rounding.
    return max(0, int(min(cpus, gpus) + 1e-6))


class Foreman:
    """Counts attempts and knows whether to go on; made into an actor by `FanOut`."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._stopped = False

    def begin(self, key: str) -> int:
        """How often the item was begun, this time included; 0 where all work is to stop."""
        if self._stopped:
            return 0
        self._begun[key] = self._begun.get(key, 0) + 1
        return self._begun[key]

    def stop(self) -> None:
        """Let workers stop at their next look."""
        self._stopped = True

    def goes_on(self) -> bool:
        """Whether nobody said stop."""
        return not self._stopped


class FanOut:
    """One wave: iterate over it for the results, in the order in which they come. Needs Ray.

    `make` makes what works on items: once per worker where `keep` (Ray actors, for what is expensive to load), else
    once per item (Ray tasks). ClusterError where workers cannot start.
    """

    def __init__(self, items: Sequence[Item], make: Callable[[], Work], workers: Workers, *, keep: bool) -> None:
        self._items, self._make, self._workers, self._keep = items, make, workers, keep
        # On the driver's own node, so that it is not lost while the wave goes on.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": here}
        self._foreman = ray.remote(Foreman).options(**options).remote()

    def stop(self) -> None:
        """Have the workers put down what they are at; from any thread. The iteration then ends by itself soon."""
        self._foreman.stop.remote()

    def __iter__(self) -> Iterator[Result]:
        import ray.data

        rows = [{"key": item.key, "payload": pickle.dumps(item.payload)} for item in self._items]
        workers = self._workers
        resources = {"num_cpus": workers.cpus, "num_gpus": workers.gpus or None}
        with _quiet_ray_data():
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
            if self._keep:
                # By default a second item would wait behind a busy worker.
                actors = ray.data.ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=1)
                arguments = (self._make, self._foreman)
                results = dataset.map(_Actor, fn_constructor_args=arguments, compute=actors, **resources)
            else:
                make, foreman = self._make, self._foreman
                tasks = ray.data.TaskPoolStrategy(size=workers.count)
                results = dataset.map(lambda row: _attempt(make(), foreman, row), compute=tasks, **resources)
            try:
                for row in results.iter_rows():
                    yield Result(**row)
            except ray.exceptions.RayError as error:
                # What an item does wrong is a result; this is a worker that cannot even start.
                lines = str(error).strip().splitlines()
                raise ClusterError(
                    f"scoring workers cannot work: {redact(lines[-1] if lines else repr(error))}"
                ) from error
            finally:
                ray.kill(self._foreman)


class _Actor:
    """Keeps one worker object for all its items."""

    def __init__(self, make: Callable[[], Work], foreman: Any) -> None:
        self._work = make()
        self._foreman = foreman

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        return _attempt(self._work, self._foreman, row)


def _attempt(work: Work, foreman: Any, row: dict[str, Any]) -> dict[str, str]:
    key = row["key"]
    attempt = ray.get(foreman.begin.remote(key))
    if attempt == 0:
        return Result(key, "stopped", "")._asdict()
    if attempt > ATTEMPTS:
        reason = f"its worker died {ATTEMPTS} times (out of memory?); it is tried again at the next start"
        return Result(key, "failed", reason)._asdict()
    try:
        work(pickle.loads(row["payload"]), lambda: bool(ray.get(foreman.goes_on.remote())))
    except Stopped:
        return Result(key, "stopped", "")._asdict()
    except Refused as refused:
        return Result(key, "failed", str(refused))._asdict()
    except LragError as error:
        return Result(key, "failed", str(error))._asdict()
    except Exception as error:  # noqa: BLE001 - told as this item's failure; the others go on
        if attempt < ATTEMPTS and _gpu_is_lost():
            # Everything after would fail in this process; Ray starts another one and hands it the item again.
            os._exit(1)
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
        return Result(key, "failed", redact(reason))._asdict()
    return Result(key, "scored", "")._asdict()


def _gpu_is_lost() -> bool:
    """Whether CUDA refuses all further work in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without a display of its own: the run has one."""
    import ray.data

    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, level = before
        logger.setLevel(level)

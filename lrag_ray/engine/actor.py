"""The rollout actor: a `RolloutWorker` inside Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
import torch

from lrag_ray.config.schema import EngineSection, RunConfig
from lrag_ray.engine.board import BoardTeller
from lrag_ray.engine.oom import Place, this_place
from lrag_ray.engine.probe_nodes import require_run
from lrag_ray.engine.queue import Yielded
from lrag_ray.engine.sizing import PoolSize, WorkerShape, this_node_drains
from lrag_ray.events import WorkerState
from lrag_ray.stages.backbone import device_for
from lrag_ray.stages.rollout.worker import RolloutResult, RolloutTask, RolloutWorker
from lrag_ray.store.run_dir import RunDirectory

WATCH = "watch"
"""Concurrency group of the methods that answer while the actor works."""


@dataclass(frozen=True)
class ActorSpec:
    """What every rollout actor is told."""

    uri: str
    """Address of the run, credentials included: never shown."""
    config: RunConfig
    created_at: str
    """Of the run: an actor that finds none of that time at the address sees another storage."""
    board: Any
    """Handle of the progress board."""


class RolloutActor:
    """Does one rollout at a time, and counts its steps.

    Needs `engine.cpus_per_actor` CPUs, `engine.gpus_per_actor` GPUs, and host memory for the history of its rollouts.
    """

    def __init__(self, spec: ActorSpec, name: str) -> None:
        self._engine = spec.config.engine
        self._steps = 0
        run = RunDirectory(spec.uri, spec.config.storage)
        require_run(run, spec.created_at)
        self._teller = BoardTeller(spec.board, name)
        make_reproducible(self._engine)
        self._worker = RolloutWorker(
            run,
            spec.config,
            device_for(self._engine.gpus_per_actor),
            self._tell,
            must_leave=this_node_drains,
        )

    def ready(self) -> Place:
        """Return where the actor lives when it can work."""
        return this_place()

    def work(self, task: RolloutTask, attempt: str) -> RolloutResult | Yielded:
        """Bring every missing horizon of a rollout to a commit, or yield where the node is about to be taken away."""
        # With a concurrency group, Ray calls methods in another thread than the constructor.
        make_reproducible(self._engine)
        self._steps += 1
        return self._worker.work(task, attempt)

    @ray.method(concurrency_group=WATCH)  # type: ignore[untyped-decorator]
    def steps(self) -> int:
        """Steps taken so far; answered while `work` goes on."""
        return self._steps

    def _tell(self, state: WorkerState) -> None:
        self._steps += 1
        self._teller(state)


def make_reproducible(engine: EngineSection) -> None:
    """Make torch compute the same in every actor of the same kind of device."""
    # Sums change with the thread count, and cuBLAS with its workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(engine.threads_per_actor)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that comes with the line above and writes every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def no_room(engine: EngineSection, seconds: float) -> str:
    """What to tell when for so long no actor could start. Needs Ray."""
    has = ray.cluster_resources()
    room = {name: round(has[name], 2) for name in ("CPU", "GPU") if name in has}
    return (
        f"no actor could start for {seconds:g} s: each takes {engine.cpus_per_actor:g} CPUs and "
        f"{engine.gpus_per_actor:g} GPUs of one node, and the whole cluster has {room}. Waiting for room"
    )


def spawn_actor(
    actor: type[Any], spec: Any, name: str, engine: EngineSection, *, memory: int = 0, watched: bool = False
) -> Any:
    """Ask Ray for an actor that reserves `memory` bytes; `spec` is what it is made from or a reference to that.

    `watched` actors have methods of the group `WATCH`. Ray restarts and retries nothing.
    """
    options: dict[str, Any] = {"memory": memory} if memory else {}
    if watched:
        options["concurrency_groups"] = {WATCH: 1}
    made = ray.remote(
        num_cpus=engine.cpus_per_actor,
        num_gpus=engine.gpus_per_actor,
        max_restarts=0,
        max_task_retries=0,
        **options,
    )
    return made(actor).remote(spec, name)


def pool_shape(engine: EngineSection) -> tuple[PoolSize, WorkerShape]:
    """How many actors the configuration asks for, and what each takes."""
    size = PoolSize(engine.least_actors, engine.most_actors)
    return size, WorkerShape(engine.cpus_per_actor, engine.gpus_per_actor)

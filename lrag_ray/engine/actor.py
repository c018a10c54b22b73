"""The rollout actor: a `RolloutWorker` inside Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
import torch

from lrag_ray.config.schema import EngineSection, RunConfig
from lrag_ray.engine.backbone import device_for
from lrag_ray.engine.progress import BoardTeller
from lrag_ray.engine.rollout_work import RolloutResult, RolloutTask, RolloutWorker
from lrag_ray.store.run_dir import RunDirectory


@dataclass(frozen=True)
class ActorSpec:
    """What every rollout actor is told."""

    uri: str
    """Address of the run, credentials included: never shown."""
    config: RunConfig
    board: Any
    """Handle of the progress board."""


class RolloutActor:
    """Needs: `engine.cpus_per_actor` CPUs and `engine.gpus_per_actor` GPUs. Does: one rollout at a time, in order."""

    def __init__(self, spec: ActorSpec, name: str) -> None:
        engine = spec.config.engine
        make_reproducible(engine)
        teller = BoardTeller(spec.board, name)
        self._worker = RolloutWorker(RunDirectory(spec.uri), spec.config, device_for(engine.gpus_per_actor), teller)

    def ready(self) -> None:
        """Return when the actor can work."""

    def work(self, task: RolloutTask, attempt: str) -> RolloutResult:
        """Bring every missing horizon of a rollout to a commit."""
        return self._worker.work(task, attempt)


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
    room = {name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    return (
        f"no actor could start for {seconds:g} s: each takes {engine.cpus_per_actor:g} CPUs and "
        f"{engine.gpus_per_actor:g} GPUs of one node, and the whole cluster has {room}. Waiting for room"
    )


def spawn_actor(actor: type[Any], spec: Any, name: str, engine: EngineSection) -> Any:
    """Ask Ray for an actor; `spec` is what it is made from or a reference to that. Ray restarts and retries nothing."""
    options = {
        "num_cpus": engine.cpus_per_actor,
        "num_gpus": engine.gpus_per_actor,
        "max_restarts": 0,
        "max_task_retries": 0,
    }
    return ray.remote(actor).options(**options).remote(spec, name)

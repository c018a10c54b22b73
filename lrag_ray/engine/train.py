"""Distributed training on Ray Train: starts the workers, connects them, replaces dead ones, shows where they are.

Ray Train gives placement, the process group, restarts after deaths and preemptions, and elastic numbers of workers.
Checkpoints are not its business: the work stores them in its run and continues from there, so a start after a crash of
the whole cluster is the same as a restart of one worker, and object stores are written by our own client, which never
publishes a truncated file. Ray keeps its own small state below ``<run>/ray/<name>``, through the same client.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow.fs
import ray
import ray.train
import torch
from ray._private.state import state as cluster_state
from ray._private.worker import global_worker
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from lrag_ray.config.training import TrainingEngineSection
from lrag_ray.engine.board import BoardReader, BoardWriter, start_board
from lrag_ray.engine.failures import first_line
from lrag_ray.engine.sizing import WorkerShape, cannot_grow, this_node_drains, usable_nodes
from lrag_ray.errors import ClusterError
from lrag_ray.events import Listener, Notice, TrainingAdvanced, WorkerLost
from lrag_ray.interrupts import take_next
from lrag_ray.store.address import Storage
from lrag_ray.training.loop import Leave, Progress
from lrag_ray.training.peers import Alone, Peers, ProcessGroup

_POLL_S = 0.5
_LOOK_EVERY_S = 1.0
"""How often a worker looks whether its node drains or the driver wants it to stop."""
_STOP_WITHIN_S = 50.0
"""After Ctrl-C: time for a step, a checkpoint and the end of the workers."""
_END_WITHIN_S = 10.0
"""For the end of a controller that is killed; a cluster that hangs is left after that."""
_LONGEST_WAIT_S = 7 * 24 * 3600
_ELASTIC_START_S = 30.0
"""How long an elastic group waits for room before its size is chosen again. Ray counts a node that was just lost for up
to 20 s, and a group of that size would wait for it until the end of the timeout."""
RAY_FOLDER = "ray"
"""Below the run."""

T = TypeVar("T", covariant=True)


class Host(Protocol):
    """What the work sees of its place; see `lrag_ray.stages.training`."""

    device: torch.device

    def leave(self) -> Leave:
        """What the worker should do soon."""

    def report(self, progress: Progress) -> None:
        """Show where the training is."""

    def warn(self, text: str) -> None:
        """Report something that a person should look into."""


class Work(Protocol[T]):
    """What every worker does, as a picklable object; all return the same."""

    def __call__(self, host: Host, peers: Peers) -> T:
        """The whole training. What it raises makes all workers start again."""


class WorkersFailedError(Exception):
    """The workers failed more often than allowed; the cause is that of the last failure."""


@dataclass(frozen=True)
class _Trouble:
    """A message from the workers, on the board."""

    text: str
    lost: bool
    """A worker was lost, as opposed to something that a person should know."""


def train(work: Work[T], engine: TrainingEngineSection, storage: Storage, name: str, *, listener: Listener) -> T:
    """What `work` returns on the first worker. Needs Ray.

    `name` must differ between trainings: Ray does not check what it finds under it. On KeyboardInterrupt the workers
    are asked to store a checkpoint and stop; a second one ends them at once. Nothing of it is left afterwards.

    Raises ClusterError where the cluster has no room or Ray Train itself fails, WorkersFailedError where the workers
    failed too often.
    """
    scaling = _scaling(engine)
    _set_limits(engine)
    board = start_board()
    fit = _Fit(lambda: _trainer(work, engine, storage, name, scaling, board).fit())
    reader = BoardReader(board)
    fit.start()
    try:
        while not fit.done.wait(_POLL_S):
            _relay(reader, listener)
    except KeyboardInterrupt:
        take_next()
        listener(Notice("storing a checkpoint before the end; a second Ctrl-C ends at once"))
        with suppress(ray.exceptions.RayError):
            ray.get(board.stop.remote())
        deadline = time.monotonic() + _STOP_WITHIN_S
        while not fit.done.wait(_POLL_S) and time.monotonic() < deadline:
            _relay(reader, listener)
        raise
    finally:
        fit.end()
        ray.kill(board)
    result: T = fit.result()
    return result


class _Fit(threading.Thread):
    """`fit` in a thread of its own: in the main one Ray Train would take over SIGINT, and no progress would show."""

    def __init__(self, fit: Callable[[], Any]) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.done = threading.Event()
        self._fit = fit
        self._value: Any = None
        self._error: Exception | None = None

    def run(self) -> None:
        """Wait for the end of the training."""
        try:
            self._value = self._fit().return_value
        except Exception as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error
        self.done.set()

    def end(self) -> None:
        """Kill the controller of a training that is still under way; the workers are its own and end with it.

        A thread that outlives the connection would start a cluster with its next call.
        """
        deadline = time.monotonic() + _END_WITHIN_S
        while not self.done.wait(_POLL_S) and time.monotonic() < deadline:
            with suppress(ray.exceptions.RayError):
                job = global_worker.current_job_id
                for key, actor in cluster_state.actor_table(None, job, None).items():
                    # Ray Train hands out no handle; its actor may be about to be created.
                    if actor["ActorClassName"] == TrainController.__name__ and actor["State"] != "DEAD":
                        global_worker.core_worker.kill_actor(ray.ActorID(bytes.fromhex(key)), True)
        self.join(_POLL_S)

    def result(self) -> Any:
        """What the first worker returned."""
        match self._error:
            case None:
                return self._value
            case WorkerGroupError() as error:
                first = next(iter(error.worker_failures.values()), error)
                raise WorkersFailedError(first_line(first)) from first
            case ControllerError() as error:
                raise ClusterError(
                    f"Ray Train cannot go on: {first_line(error.controller_failure)}. Fix: `lrag-ray doctor` checks "
                    "the cluster; the same command continues"
                ) from error
            case ray.exceptions.RayError() as error:
                raise ClusterError(
                    f"the controller of Ray Train ended: {first_line(error)}. Fix: `lrag-ray doctor` checks the "
                    "cluster; the same command continues"
                ) from error
            case TrainingFailedError() as error:
                raise WorkersFailedError(first_line(error)) from error
            case error:
                raise error


def _relay(reader: BoardReader, listener: Listener) -> None:
    for worker, state in reader.new_states().items():
        if isinstance(state, Progress):
            listener(TrainingAdvanced(**state._asdict()))
        elif isinstance(state, _Trouble):
            listener(WorkerLost(worker, state.text) if state.lost else Notice(state.text, warning=True))


def _trainer(
    work: Work[Any], engine: TrainingEngineSection, storage: Storage, name: str, scaling: ScalingConfig, board: Any
) -> TorchTrainer:
    timeout_s = int(engine.stall_timeout_s or _LONGEST_WAIT_S)
    return TorchTrainer(
        _worker,
        train_loop_config={"work": work, "board": board, "gpu": bool(engine.gpus_per_actor)},
        torch_config=TorchConfig(backend="nccl" if engine.gpus_per_actor else "gloo", timeout_s=timeout_s),
        scaling_config=scaling,
        run_config=RunConfig(
            name=name,
            storage_path=f"{storage.root}/{RAY_FOLDER}",
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs)),
            # By default a training does not survive the death of a worker.
            failure_config=FailureConfig(max_failures=engine.max_attempts - 1, max_preemption_failures=-1),
            callbacks=[_Deaths(board)],
            # Equal matrix products need a fixed work space.
            worker_runtime_env={"env_vars": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _scaling(engine: TrainingEngineSection) -> ScalingConfig:
    """How many workers; ClusterError where a cluster that cannot grow has no room for the least."""
    shape = WorkerShape(engine.cpus_per_actor, engine.gpus_per_actor)
    nodes = usable_nodes(set())
    room = sum(shape.slots(node) for node in nodes)
    least = engine.least_actors
    most = engine.most_actors or max(room, least)
    if room < least and cannot_grow(engine.address, nodes):
        raise ClusterError(
            f"engine.actors asks for {least} workers with {engine.cpus_per_actor:g} CPUs and {engine.gpus_per_actor:g} "
            f"GPUs each, and the cluster has room for {room}. Fix: fewer actors, or a larger cluster (engine.address)"
        )
    return ScalingConfig(
        num_workers=least if most == least else (least, most),
        use_gpu=bool(engine.gpus_per_actor),
        resources_per_worker={"CPU": engine.cpus_per_actor, **({"GPU": 1} if engine.gpus_per_actor else {})},
        elastic_resize_monitor_interval_s=engine.resize_every_s,
    )


_own_limits: dict[str, str] = {}
"""Those that `_set_limits` set for the training before, in this process."""


def _set_limits(engine: TrainingEngineSection) -> None:
    """Limits that Ray Train takes from the environment only; what the user set there wins."""
    start_s = engine.start_timeout_s
    if engine.most_actors != engine.least_actors:
        start_s = min(start_s, _ELASTIC_START_S)
    limits = {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(engine.stall_timeout_s or _LONGEST_WAIT_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_s),
    }
    for name, value in limits.items():
        if os.environ.get(name) == _own_limits.get(name):
            os.environ[name] = _own_limits[name] = value


class _Deaths(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Tells the driver why workers ended; runs in the controller's process."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Note the failures of a group of workers."""
        for rank, error in sorted(worker_exceptions.items()):
            self._board.write.options(num_returns=0).remote(f"worker {rank}", _Trouble(first_line(error), lost=True))


class _WorkerHost:
    """The place of a worker."""

    def __init__(self, board: Any, *, gpu: bool) -> None:
        # Workers without a GPU may see one all the same.
        self.device = ray.train.torch.get_device() if gpu else torch.device("cpu")
        self._rank = ray.train.get_context().get_world_rank()
        self._board = board
        self._writer = BoardWriter(board, "training")
        self._looked_s = 0.0
        self._asked: Any = None
        self._drain_seen = False

    def leave(self) -> Leave:
        """Once a second: whether the driver wants to stop, or the node begins to drain."""
        now = time.monotonic()
        if now - self._looked_s < _LOOK_EVERY_S:
            return ""
        self._looked_s = now
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            with suppress(ray.exceptions.RayError):
                if ray.get(asked):
                    return "stop"
        if self._asked is None and self._rank == 0:
            self._asked = self._board.stopping.remote()
        if not self._drain_seen and this_node_drains():
            self._drain_seen = True
            return "checkpoint"
        return ""

    def report(self, progress: Progress) -> None:
        """To the board, from the first worker."""
        if self._rank == 0:
            self._writer.write(progress)

    def warn(self, text: str) -> None:
        """To the board."""
        self._board.write.options(num_returns=0).remote("storage", _Trouble(text, lost=False))


def _worker(config: dict[str, Any]) -> Any:
    """The train function: the same on every worker."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    peers: Peers = ProcessGroup() if torch.distributed.is_initialized() else Alone()
    end = config["work"](_WorkerHost(config["board"], gpu=config["gpu"]), peers)
    # Every worker reports once: a worker whose peers still work would count as hanging otherwise.
    ray.train.report({})
    return end

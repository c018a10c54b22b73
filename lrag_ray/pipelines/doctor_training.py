"""What an encoder training will find: its data, what it begins with, storage, disk, workers and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.errors import LragError, WeightsError
from lrag_ray.events import Event, Notice
from lrag_ray.pipelines.doctor import CUDA_CONTEXT_BYTES, Row, State, disk_row, storage_row, threads_row
from lrag_ray.pipelines.history_choice import HOST_SHARE
from lrag_ray.pipelines.plan_training import TrainingPlan, plan_training
from lrag_ray.pipelines.train_encoder import TrainEncoderJob
from lrag_ray.printable import counted, quantity
from lrag_ray.store.address import Storage
from lrag_ray.weights.local import is_remote


def examine_training(config: TrainEncoderConfig) -> Iterator[Row]:
    """Findings for a training, after those for the machine."""
    plan = None
    try:
        plan = plan_training(config)
    except LragError as error:
        yield Row("dataset", "fail", str(error))
    else:
        yield Row("dataset", "ok", _described(plan))
        yield from _start(config)
    yield storage_row(config.run.uri, config.storage)
    if not is_remote(config.run.uri):
        # A checkpoint is written beside the one that it replaces.
        needed = plan.stored_bytes + plan.checkpoint_bytes if plan is not None else None
        yield disk_row(Path(Storage(config.run.uri).root), needed)
    yield _workers(config)
    yield threads_row(config.engine)
    if plan is not None:
        yield _memory(config, plan)


def _described(plan: TrainingPlan) -> str:
    return (
        f"{', '.join(plan.data)}: {counted(plan.rollouts, 'rollout')}, {counted(plan.frames, 'latent frame')}; "
        f"{plan.training_rollouts:,} for "
        f"training, {plan.validation_rollouts} for validation; {counted(plan.steps_per_epoch, 'step')} per "
        f"epoch, {plan.steps} in "
        "all"
    )


def _start(config: TrainEncoderConfig) -> Iterator[Row]:
    """What the training itself would refuse or remark on before any worker starts."""
    remarks: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Notice):
            remarks.append(event.text)

    start_from = config.training.start_from
    try:
        TrainEncoderJob(config, listen)
    except WeightsError as error:
        yield Row("start_from", "fail", str(error))
    except LragError as error:
        yield Row("run", "fail", str(error))
    else:
        if start_from is not None:
            yield Row("start_from", "ok", f"{start_from} fits")
    for remark in remarks:
        yield Row("dataset", "warn", remark)


def _workers(config: TrainEncoderConfig) -> Row:
    """Whether this machine has room for the least number of workers."""
    engine, cores = config.engine, len(os.sched_getaffinity(0))
    least, cpus, gpus = engine.least_actors, engine.cpus_per_actor, engine.gpus_per_actor
    kind = f"{cpus:g} CPU{'s' * (cpus != 1)}" + (f" and {gpus:g} GPU{'s' * (gpus != 1)}" if gpus else "")
    found = f"at least {least} with {kind} each; this machine has {counted(cores, 'CPU')}"
    here = torch.cuda.device_count() if gpus else None
    if here is not None:
        found += f" and {counted(here, 'GPU')}"
    if least * cpus <= cores and (here is None or least * gpus <= here):
        return Row("workers", "ok", found)
    state: State = "warn" if engine.address or os.environ.get("RAY_ADDRESS") else "fail"
    return Row("workers", state, found, "fewer engine.actors or engine.cpus_per_actor, or a cluster (engine.address)")


def _memory(config: TrainEncoderConfig, plan: TrainingPlan) -> Row:
    """Weights, optimiser, activations and windows of the workers, against the GPU or the memory of this machine."""
    engine = config.engine
    least = engine.least_actors
    windows = -(-min(config.training.batch_size, plan.training_rollouts) // least)
    found = (
        f"a worker needs about {quantity(plan.worker_bytes, 'B')} ({quantity(plan.activation_bytes, 'B')} of "
        f"activations for {counted(windows, 'window')} in float32)"
    )
    fix = "a smaller training.batch_size, or more engine.actors, which share a batch"
    if engine.gpus_per_actor:
        if not torch.cuda.is_available():
            return Row("gpu memory", "warn", f"{found}; there is no GPU here to compare it with")
        total = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        halved = plan.activation_bytes // 2 if config.training.amp else 0
        fits = plan.worker_bytes - halved + CUDA_CONTEXT_BYTES < total
        found += f"{', half of that with training.amp' if halved else ''}, of {quantity(total, 'B')}"
        return Row("gpu memory", "ok" if fits else "fail", found, "" if fits else fix)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found += f"; {least} at once, of {quantity(total, 'B')}"
    fits = least * plan.worker_bytes < HOST_SHARE * total
    state: State = "ok" if fits else "warn" if engine.address else "fail"
    return Row("host memory", state, found, "" if fits else fix)

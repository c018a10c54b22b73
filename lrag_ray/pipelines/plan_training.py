"""What an encoder training comes to, from its configuration and the index of its data: steps, hours, memory.

Hours come from the steps that a training has measured, else they are bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.errors import UsageError
from lrag_ray.pipelines.plan import Hours
from lrag_ray.pipelines.training_data import training_rollouts
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.losses import LossConfig, encoder_losses
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.training_run import TrainingRun, holds_training
from lrag_ray.training.read_ahead import AHEAD
from lrag_ray.wan.devices import DEVICES, gpu_hours

TRAINING_SHARE = (0.008, 0.2)
"""Shares of a GPU's bfloat16 peak between which an unmeasured training is planned. The paper's own training, under 100
hours of an RTX A6000, reaches at least the lower one."""
_FLOAT32_BYTES = 4
_LOSS_ROW_BYTES = 64


@dataclass(frozen=True)
class TrainingSpeed:
    """What a training measured."""

    source: str
    """Its address."""
    steps: int
    """Behind the numbers."""
    train_windows_per_s: float
    """Windows per second and worker in training steps, the waits for windows and checkpoints included."""
    validation_windows_per_s: float | None
    """The same for validation; None where there was none."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a training comes to."""

    uri: str
    data: Sequence[str]
    """Addresses of the datasets."""
    rollouts: int
    frames: int
    """Latent frames of all rollouts."""
    training_rollouts: int
    validation_rollouts: int
    epochs: int
    steps_per_epoch: int
    steps: int
    parameters: int
    flops: float
    """All steps and validations; a multiply-add counts as two, a backward pass as two forward ones."""
    window_bytes: int
    """As stored."""
    read_bytes: int
    """All windows of all epochs."""
    model_bytes: int
    """Weights, gradients and two moments, float32."""
    activation_bytes: int
    """What the backward pass of a worker's share of a batch needs, in float32; with float16 on a GPU about half.
    `engine.actors` says how many workers share a batch, at least."""
    batch_bytes: int
    """Windows that a worker holds at most, read ahead included."""
    checkpoint_bytes: int
    stored_bytes: int
    """All of the run at its end: two checkpoints and the losses."""
    gpu_hours: dict[str, Hours]
    """Bounds by kind of GPU (`TRAINING_SHARE`); empty for a training on CPUs."""
    speed: TrainingSpeed | None
    """None where nothing was measured."""
    worker_hours: float | None
    """Hours of one worker at the measured speed."""
    notes: Sequence[str]

    @property
    def worker_bytes(self) -> int:
        """Memory of a worker beside its libraries."""
        return self.model_bytes + self.activation_bytes + self.batch_bytes


def plan_training(config: TrainEncoderConfig, speeds_of: str | None = None) -> TrainingPlan:
    """The plan of a training, of one that has begun on this machine with its own rollouts; reads no latents.

    `speeds_of` is the address of a training whose steps tell the speed, by default that of `run.uri` if it is on this
    machine. Raises UsageError and StorageError for data that the training would refuse, and for an address without
    measured steps; IdentityError where data of a training that has begun is gone.
    """
    config = with_absolute_paths(config)
    dataset = LatentDataset.open(*config.data.uris, storage=config.storage)
    length = config.data.window_frames
    notes: list[str] = []
    run = TrainingRun(config.run.uri, config.storage)
    stored = run.rollouts() if run.storage.is_local and holds_training(run.storage) else None
    rollouts = training_rollouts(dataset, config, stored, notes.append, notes.append)
    validation = int(rollouts.validation.sum())
    training = len(rollouts.keys) - validation
    channels, height, width = dataset.shape
    sizes = EncoderConfig(channels, height, width, config.encoder.latent_dim, config.encoder.hidden_dims)
    with torch.device("meta"):
        model = LatentAutoencoder(sizes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = config.training.epochs
    steps = -(-training // config.training.batch_size)
    window_bytes = length * prod(dataset.shape) * dataset.dtype.itemsize
    share = -(-min(config.training.batch_size, training) // config.engine.least_actors)
    flops = float(epochs * length * (3 * training + validation) * _forward_flops(model))
    checkpoint_bytes = 3 * parameters * _FLOAT32_BYTES
    speed = _speed(config, speeds_of)
    if config.preset == "as_released":
        notes.append(
            "as_released keeps the smoothness loss in the AE baseline, as the released configuration does; the "
            "paper's row AE has neither delta nor smoothness (preset: ae_only)"
        )
    return TrainingPlan(
        uri=run.uri,
        data=dataset.uris,
        rollouts=len(rollouts.keys),
        frames=int(rollouts.frames.sum()),
        training_rollouts=training,
        validation_rollouts=validation,
        epochs=epochs,
        steps_per_epoch=steps,
        steps=steps * epochs,
        parameters=parameters,
        flops=flops,
        window_bytes=window_bytes,
        read_bytes=epochs * (training + validation) * window_bytes,
        model_bytes=4 * parameters * _FLOAT32_BYTES,
        activation_bytes=share * _activation_bytes(model, length),
        batch_bytes=(AHEAD + 1) * share * window_bytes,
        checkpoint_bytes=checkpoint_bytes,
        stored_bytes=2 * checkpoint_bytes + epochs * (steps + 1) * _LOSS_ROW_BYTES,
        gpu_hours={
            device.name: Hours(*(gpu_hours(flops, device, part) for part in reversed(TRAINING_SHARE)))
            for device in DEVICES
            if config.engine.gpus_per_actor
        },
        speed=speed,
        worker_hours=_worker_hours(speed, epochs * training, epochs * validation) if speed is not None else None,
        notes=notes,
    )


def _speed(config: TrainEncoderConfig, speeds_of: str | None) -> TrainingSpeed | None:
    run = TrainingRun(speeds_of or config.run.uri, config.storage)
    if speeds_of is None and not (run.storage.is_local and holds_training(run.storage)):
        return None
    run.require()
    totals = {"train": (0, 0.0), "validation": (0, 0.0)}
    losses = run.losses()
    columns = (losses[name].to_pylist() for name in ("split", "windows", "seconds", "workers"))
    for split, windows, seconds, workers in zip(*columns, strict=True):
        done, spent = totals.get(split, (0, 0.0))
        totals[split] = (done + windows, spent + seconds * workers)
    (trained, training_s), (validated, validation_s) = totals["train"], totals["validation"]
    if not training_s > 0:
        if speeds_of is None:
            return None
        raise UsageError(
            f"--from {speeds_of}: this training has stored no step yet, so there is no speed to plan with. Fix: name "
            "one that has, or leave --from out"
        )
    return TrainingSpeed(
        source=run.uri,
        steps=sum(split == "train" for split in losses["split"].to_pylist()),
        train_windows_per_s=trained / training_s,
        validation_windows_per_s=validated / validation_s if validation_s > 0 else None,
    )


def _worker_hours(speed: TrainingSpeed, trained: int, validated: int) -> float:
    # Where nothing was validated, a window is taken to need what one in training does.
    validation = speed.validation_windows_per_s or speed.train_windows_per_s
    return (trained / speed.train_windows_per_s + validated / validation) / 3600


def _activation_bytes(model: LatentAutoencoder, length: int) -> int:
    """What the backward pass of one window needs, in float32; `model` is on the meta device."""
    sizes = model.config

    def saved(windows: int) -> int:
        kept: dict[int, torch.Tensor] = {}

        # By identity: several operations keep one tensor.
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[id(tensor)] = tensor
            return tensor

        shape = (windows, length, sizes.in_channels, sizes.spatial_h, sizes.spatial_w)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encoder_losses(model, torch.empty(shape, device="meta"), LossConfig())
        return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    # Weights are saved once, however many windows there are.
    return saved(2) - saved(1)


def _forward_flops(model: LatentAutoencoder) -> int:
    """Operations of encoder and decoder on one latent frame; `model` is on the meta device."""
    sizes = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, sizes.in_channels, sizes.spatial_h, sizes.spatial_w, device="meta"))
    return int(counter.get_total_flops())

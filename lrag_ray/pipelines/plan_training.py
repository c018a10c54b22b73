"""What an encoder training comes to, from its configuration and the index of its data: steps, arithmetic, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.store.address import Storage
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.training.read_ahead import AHEAD
from lrag_ray.training.windows import in_validation

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class TrainingPlan:
    """A training that has not run."""

    uri: str
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
    batch_bytes: int
    """Windows that each worker holds at most, where it is alone."""
    checkpoint_bytes: int
    notes: Sequence[str]


def plan_training(config: TrainEncoderConfig) -> TrainingPlan:
    """The plan of a training; reads the index of its data and no latents.

    Raises UsageError and StorageError for datasets that are absent, empty or of different shapes.
    """
    config = with_absolute_paths(config)
    dataset = LatentDataset.open(*config.data.uris, storage=config.storage)
    length = config.data.window_frames
    frames = dataset.frames
    keys = [key for key, count in zip(dataset.keys, frames.tolist(), strict=True) if count >= length]
    validation = sum(in_validation(key, config.data.validation_fraction) for key in keys)
    training = len(keys) - validation
    channels, height, width = dataset.shape
    sizes = EncoderConfig(channels, height, width, config.encoder.latent_dim, config.encoder.hidden_dims)
    with torch.device("meta"):
        model = LatentAutoencoder(sizes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = config.training.epochs
    steps = -(-training // config.training.batch_size)
    window_bytes = length * prod(dataset.shape) * dataset.dtype.itemsize
    notes = []
    if short := len(frames) - len(keys):
        then = "they are left out" if config.data.short_rollouts == "skip" else "the training will refuse them"
        notes.append(f"{short} rollouts are shorter than data.window_frames {length}: {then} (data.short_rollouts)")
    if training < config.training.batch_size:
        notes.append(f"the training split has fewer rollouts than training.batch_size: batches of {training}")
    if not training or (config.data.validation_fraction and not validation):
        notes.append("a split is empty: the training will refuse to start (data.validation_fraction)")
    if config.preset == "as_released":
        notes.append(
            "as_released keeps the smoothness loss in the AE baseline, as the released configuration does; the "
            "paper's row AE has neither delta nor smoothness (preset: ae_only)"
        )
    return TrainingPlan(
        uri=Storage(config.run.uri, config.storage).uri,
        rollouts=len(frames),
        frames=int(frames.sum()),
        training_rollouts=training,
        validation_rollouts=validation,
        epochs=epochs,
        steps_per_epoch=steps,
        steps=steps * epochs,
        parameters=parameters,
        flops=float(epochs * length * (3 * training + validation) * _forward_flops(model)),
        window_bytes=window_bytes,
        read_bytes=epochs * (training + validation) * window_bytes,
        model_bytes=4 * parameters * _FLOAT32_BYTES,
        batch_bytes=(AHEAD + 1) * min(config.training.batch_size, max(training, 1)) * window_bytes,
        checkpoint_bytes=3 * parameters * _FLOAT32_BYTES,
        notes=notes,
    )


def _forward_flops(model: LatentAutoencoder) -> int:
    """Operations of encoder and decoder on one latent frame; `model` is on the meta device."""
    sizes = model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, sizes.in_channels, sizes.spatial_h, sizes.spatial_w, device="meta"))
    return int(counter.get_total_flops())

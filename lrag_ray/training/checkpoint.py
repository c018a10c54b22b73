"""Checkpoints of the encoder in the format of the released trainer, with what an exact resume needs beside it.

A checkpoint is a dict with ``epoch`` (the last finished one, from 0; -1 before), ``model``, ``optimizer``, ``scaler``,
``config`` and, in the best one, ``val_loss``: `lrag_ray.retrieval.encoder.load_encoder` and the released code load it.
Ours also holds ``lrag_ray``: position in the epoch, steps, and the sums of the epoch so far. The random state is not in
it, because the order of windows is a function of seed, epoch and position (`lrag_ray.training.windows`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lrag_ray.errors import WeightsError
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.losses import LossConfig
from lrag_ray.retrieval.training import OptimizerConfig
from lrag_ray.wan.state_dict import load_strict, refuse_non_finite
from lrag_ray.wan.torch_seal import sealed

OWN_KEY = "lrag_ray"
"""Of what the released format has no place for."""


@dataclass
class Position:
    """Where a training is."""

    epoch: int = 0
    """The epoch under way, from 0."""
    batch: int = 0
    """Batches of it that are done."""
    step: int = 0
    """Optimiser steps since the beginning."""
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Sum over the epoch's windows so far of recon, delta and smooth."""
    windows: int = 0
    """Windows of the epoch so far."""
    best: float | None = None
    """Lowest validation total so far."""
    best_epoch: int | None = None


def trainer_config(
    sizes: EncoderConfig,
    losses: LossConfig,
    optimizer: OptimizerConfig,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    window_frames: int,
    validation_fraction: float,
    amp: bool,
) -> dict[str, Any]:
    """All fields of the released trainer's configuration, under its names; those that mean nothing here are empty."""
    return {
        "config": "", "tag": "", "gpu": 0, "data_dir": "", "val_split": validation_fraction, "num_workers": 0,
        "data_percentage": 1.0, "seq_len": window_frames,
        "in_channels": sizes.in_channels, "spatial_h": sizes.spatial_h, "spatial_w": sizes.spatial_w,
        "latent_dim": sizes.latent_dim, "hidden_dims": list(sizes.hidden_dims),
        "batch_size": batch_size, "lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "epochs": epochs,
        "delta_margin": losses.delta_margin, "delta_weight": losses.delta_weight, "delta_window": losses.delta_window,
        "smooth_weight": losses.smooth_weight, "grad_clip": optimizer.grad_clip, "use_amp": amp,
        "log_dir": "", "log_every": 20, "save_every": 50, "resume": "",
        "wandb_project": "", "wandb_run_name": "", "wandb_entity": "", "disable_wandb": True, "seed": seed,
    }  # fmt: skip


def checkpoint_bytes(content: Mapping[str, Any]) -> bytes:
    """A checkpoint as the file that ``torch.save`` writes, sealed."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return sealed(buffer.getvalue())


def on_host(value: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are on the CPU and shared with nothing."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item) for item in value)
    return value


def load_state(
    content: Mapping[str, Any],
    source: str,
    model: LatentAutoencoder,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
) -> Position:
    """Put a checkpoint, ours or the released trainer's, into model, optimiser and scaler; returns where it stands.

    `source` names the file in messages. Raises WeightsError for what is not such a checkpoint, does not fit the model,
    or is not finite.
    """
    fix = "Fix: name a checkpoint of an encoder of the same sizes"
    absent = sorted({"epoch", "model", "optimizer", "config"} - content.keys())
    if absent or not all(isinstance(content[key], Mapping) for key in ("model", "optimizer", "config")):
        raise WeightsError(
            f"{source} cannot be continued from: it lacks {', '.join(absent) or 'a state dict'}. Fix: name a "
            "checkpoint that the encoder trainer wrote"
        )
    try:
        sizes = EncoderConfig.from_checkpoint(content["config"])
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{source}: its config is wrong: {error}. {fix}") from error
    if sizes != model.config:
        raise WeightsError(f"{source} holds an encoder of {sizes}, and this training has {model.config}. {fix}")
    weights = {str(name): value for name, value in content["model"].items()}
    with torch.device("meta"):
        shapes = LatentAutoencoder(model.config)
    load_strict(shapes, weights, source, fix)
    refuse_non_finite(weights, source)
    model.load_state_dict(weights)
    # The hyper-parameters are those of this training, whatever the file says.
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        # Copied: the optimiser would work in the loaded tensors, which may be mapped to the file.
        optimizer.load_state_dict(on_host(content["optimizer"]))
        for group, ours in zip(optimizer.param_groups, settings, strict=True):
            group.update(ours)
        scaler_state = content.get("scaler") or {}
        if scaler_state and scaler.is_enabled():
            scaler.load_state_dict(dict(scaler_state))
        own = content.get(OWN_KEY)
        position = Position(epoch=int(content["epoch"]) + 1) if own is None else _position(own)
        for parameter, state in optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != parameter.shape:
                    raise ValueError(f"{name} is {list(state[name].shape)}, its weight {list(parameter.shape)}")
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"{source}: its optimiser, scaler or position does not fit ({error}). {fix}") from error
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    refuse_non_finite({f"moment {i}": moment for i, moment in enumerate(moments)}, f"{source} (optimiser)")
    return position


def _position(content: Mapping[str, Any]) -> Position:
    """A stored position; ValueError or TypeError for what is not one."""
    position = Position(**content)
    counts = (position.epoch, position.batch, position.step, position.windows)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"counts {counts}")
    if len(position.sums) != 3 or not all(isinstance(total, float) for total in position.sums):
        raise ValueError("sums of an epoch are three numbers")
    if position.best is not None and not isinstance(position.best, float):
        raise ValueError("the best validation loss is not a number")
    return position

"""One optimisation step of the retrieval encoder. The loop around it is `lrag_ray.training`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lrag_ray.retrieval.encoder import LatentAutoencoder
from lrag_ray.retrieval.losses import EncoderLosses, LossConfig, encoder_losses


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on all parameters at a constant learning rate; the defaults are the released setting."""

    lr: float = 3e-4
    """Learning rate."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, on biases and norms too."""
    grad_clip: float = 1.0
    """Largest total gradient norm; 0 does not clip."""


class StepReport(NamedTuple):
    """What one step measured before it changed the weights."""

    losses: EncoderLosses
    """Detached, over the batches of all workers."""
    grad_norm: Tensor
    """Total gradient norm before clipping, a scalar; not finite where the scaler skips the step."""


class NonFiniteStepError(ArithmeticError):
    """A loss or gradient is NaN or infinite; the weights are those before the step."""


Combine = Callable[[list[Tensor]], None]
"""Replaces each tensor by its sum over all workers, in place."""


def make_optimizer(model: LatentAutoencoder, config: OptimizerConfig) -> torch.optim.AdamW:
    """Optimiser over all parameters of `model`."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999), eps=1e-8
    )


def shared_losses(model: LatentAutoencoder, batch: Tensor, losses: LossConfig, *, share: float, amp: bool) -> Tensor:
    """The three terms [3] on `batch` [b, S, C, H, W], times `share`; zeros where the batch is empty.

    Every term is a mean over sequences, so the sum over workers, each with its share of the sequences, is the mean
    over all of them.
    """
    if not len(batch):
        return batch.new_zeros(3, dtype=torch.float32)
    with torch.autocast(batch.device.type, torch.float16, enabled=amp):
        terms = encoder_losses(model, batch, losses)
    return torch.stack([term.float() for term in terms]) * share


def train_step(
    model: LatentAutoencoder,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    losses: LossConfig,
    grad_clip: float = 1.0,
    *,
    share: float = 1.0,
    scaler: GradScaler | None = None,
    combine: Combine | None = None,
) -> StepReport:
    """One step on `batch` [b, S, C, H, W], this worker's part of the global batch.

    `share` is its fraction of the global batch's sequences and may be 0. `combine` sums gradients and losses over the
    workers, so that all of them take the same step. An enabled `scaler` runs the model in float16; it skips steps
    whose gradients overflow and lowers its scale, down to 1: gradients that are not finite then are the model's own.

    Raises NonFiniteStepError, on every worker alike, before the weights change.
    """
    optimizer.zero_grad(set_to_none=True)
    amp = scaler is not None and scaler.is_enabled()
    terms = shared_losses(model, batch, losses, share=share, amp=amp)
    total = terms[0] + terms[1] + terms[2]
    if scaler is not None and amp:
        # Also where the batch is empty: the scaler has no scale before.
        total = scaler.scale(total)
    if len(batch):
        total.backward()
    parameters = list(model.parameters())
    terms = terms.detach()
    if combine is not None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        combine([parameter.grad for parameter in parameters if parameter.grad is not None] + [terms])
    if scaler is not None and amp:
        scaler.unscale_(optimizer)
    grad_norm = (
        torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        if grad_clip > 0
        else torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    )
    # A scale above 1 may be to blame for gradients, and is lowered then.
    scaled = scaler is not None and amp and scaler.get_scale() > 1
    # A step on NaN would leave nothing to continue from.
    if not bool(torch.isfinite(terms if scaled else torch.cat([terms, grad_norm.reshape(1)])).all()):
        raise NonFiniteStepError(f"losses {terms.tolist()}, gradient norm {float(grad_norm)}")
    if scaler is not None and amp:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    return StepReport(EncoderLosses(*terms.unbind()), grad_norm.detach())

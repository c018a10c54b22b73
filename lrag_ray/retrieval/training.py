"""One optimisation step of the retrieval encoder. The distributed loop around it belongs to the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def make_optimizer(model: LatentAutoencoder, config: OptimizerConfig) -> torch.optim.AdamW:
    """Optimiser over all parameters of `model`."""
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.999), eps=1e-8
    )


def train_step(
    model: LatentAutoencoder,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    losses: LossConfig,
    grad_clip: float = 1.0,
) -> EncoderLosses:
    """One step on `batch` [B, S, C, H, W]; returns the detached losses before the step."""
    optimizer.zero_grad(set_to_none=True)
    terms = encoder_losses(model, batch, losses)
    terms.total.backward()
    if grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return EncoderLosses(*(term.detach() for term in terms))

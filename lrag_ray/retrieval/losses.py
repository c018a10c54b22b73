"""Losses of the retrieval encoder on runs of consecutive latent frames.

Reconstruction keeps the embedding informative; SeqDelta pushes neighbouring frames apart where their cosine exceeds a
margin; the smoothness term keeps trajectories from jumping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.retrieval.encoder import LatentAutoencoder


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms; the defaults are the released AE + SeqDelta setting (`delta_weight` 0 is AE only)."""

    delta_margin: float = 0.85
    """Cosine above which two near frames are pushed apart."""
    delta_weight: float = 1.0
    """Weight of the SeqDelta hinge."""
    delta_window: int = 3
    """Largest frame offset that SeqDelta compares."""
    smooth_weight: float = 1.0
    """Weight of the smoothness term."""


class EncoderLosses(NamedTuple):
    """Weighted terms, each a scalar tensor."""

    recon: Tensor
    """Mean squared reconstruction error."""
    delta: Tensor
    """SeqDelta hinge."""
    smooth: Tensor
    """Second difference of the embedding along time."""

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.recon + self.delta + self.smooth


def seq_delta(embeddings: Tensor, config: LossConfig) -> Tensor:
    """Hinge on the cosine of frames 1..window apart; `embeddings` is [B, S, D], un-normalised."""
    offsets = range(1, min(config.delta_window, embeddings.shape[1] - 1) + 1)
    if not offsets:
        return embeddings.new_zeros(())
    cosines = [F.cosine_similarity(embeddings[:, k:], embeddings[:, :-k], dim=-1) for k in offsets]
    hinges = [F.relu(cosine - config.delta_margin).mean() for cosine in cosines]
    return config.delta_weight * torch.stack(hinges).mean()


def smoothness(embeddings: Tensor, config: LossConfig) -> Tensor:
    """Mean length of the second difference along time; `embeddings` is [B, S, D], un-normalised."""
    if embeddings.shape[1] < 3 or config.smooth_weight == 0:
        return embeddings.new_zeros(())
    second = embeddings[:, 2:] - 2 * embeddings[:, 1:-1] + embeddings[:, :-2]
    # The small constant keeps the gradient of the root finite where an embedding stands still.
    return config.smooth_weight * (second.square().sum(-1) + 1e-8).sqrt().mean()


def encoder_losses(model: LatentAutoencoder, batch: Tensor, config: LossConfig) -> EncoderLosses:
    """All terms on `batch` [B, S, C, H, W], S consecutive latent frames per sequence."""
    sequences, length = batch.shape[:2]
    frames = batch.flatten(0, 1)
    embedding, reconstruction = model(frames)
    by_sequence = embedding.unflatten(0, (sequences, length))
    return EncoderLosses(
        recon=F.mse_loss(reconstruction, frames),
        delta=seq_delta(by_sequence, config),
        smooth=smoothness(by_sequence, config),
    )

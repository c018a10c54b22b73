"""One optimiser step of the retrieval encoder. The golden trajectories are in tests/golden."""

from __future__ import annotations

import pytest
import torch

from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.losses import LossConfig, encoder_losses
from lrag_ray.retrieval.training import OptimizerConfig, make_optimizer, train_step
from lrag_ray.wan.random_weights import fill_random

BATCH = torch.randn(2, 4, 4, 6, 10, generator=torch.Generator().manual_seed(0))


def built() -> LatentAutoencoder:
    model = LatentAutoencoder(EncoderConfig(in_channels=4, spatial_h=6, spatial_w=10, latent_dim=8, hidden_dims=(8,)))
    fill_random(model, seed=3)
    return model


def gradient_norm(model: LatentAutoencoder) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_gradients_are_clipped_to_a_total_norm_unless_it_is_zero(clip: float) -> None:
    exact = built()
    encoder_losses(exact, BATCH, LossConfig()).total.backward()
    assert gradient_norm(exact) > 0.2
    model = built()
    train_step(model, make_optimizer(model, OptimizerConfig()), BATCH, LossConfig(), clip)
    assert gradient_norm(model) == pytest.approx(clip or gradient_norm(exact), rel=1e-3)


def test_the_losses_are_those_before_the_step_and_carry_no_graph() -> None:
    model, before = built(), encoder_losses(built(), BATCH, LossConfig())
    reported = train_step(model, make_optimizer(model, OptimizerConfig()), BATCH, LossConfig()).losses
    assert torch.equal(reported.total, before.total)
    assert not reported.total.requires_grad


def test_weight_decay_is_decoupled_and_spares_nothing() -> None:
    """Given no gradients at all, every parameter shrinks by lr·decay, biases and norms too."""
    model = built()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, start in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), start * (1 - 0.1 * 0.5))


def test_single_frames_are_only_reconstructed() -> None:
    """Given sequences of one frame, there are no neighbours to push apart and no path to smooth."""
    with torch.no_grad():
        losses = encoder_losses(built(), BATCH[:, :1], LossConfig())
    assert float(losses.delta) == float(losses.smooth) == 0
    assert float(losses.total) == float(losses.recon) > 0

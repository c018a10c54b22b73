"""The retrieval encoder: sizes, strict loading, losses by hand. The golden numbers are in tests/conformance."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lrag_ray.errors import WeightsError
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder, load_encoder
from lrag_ray.retrieval.losses import LossConfig, seq_delta, smoothness
from lrag_ray.retrieval.training import OptimizerConfig, make_optimizer, train_step
from lrag_ray.wan.random_weights import fill_random

SIZES = EncoderConfig(in_channels=4, spatial_h=6, spatial_w=10, latent_dim=8, hidden_dims=(8, 12))


@pytest.fixture
def model() -> LatentAutoencoder:
    built = LatentAutoencoder(SIZES)
    fill_random(built, seed=3)
    return built


def save(path: Path, model: LatentAutoencoder, /, **changes: object) -> Path:
    content = {"epoch": 0, "model": model.state_dict(), "config": asdict(model.config) | {"lr": 3e-4}} | changes
    torch.save(content, path)
    return path


def test_full_size_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        full = LatentAutoencoder(EncoderConfig())
    assert sum(parameter.numel() for parameter in full.parameters()) == 30_231_696


def test_descriptors_have_unit_length_and_reconstructions_the_frame_size(model: LatentAutoencoder) -> None:
    frames = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encode(frames).norm(dim=-1), torch.ones(3))
    embedding, reconstruction = model(frames)
    assert embedding.shape == (3, 8)
    assert reconstruction.shape == frames.shape


def test_a_saved_encoder_loads_with_the_same_digest(tmp_path: Path, model: LatentAutoencoder) -> None:
    loaded = load_encoder(save(tmp_path / "encoder.pt", model))
    assert loaded.config == SIZES
    assert loaded.digest() == model.digest()
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "model."])
def test_what_training_wrapped_around_an_encoder_is_dropped(
    tmp_path: Path, model: LatentAutoencoder, prefix: str
) -> None:
    weights = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    assert load_encoder(save(tmp_path / "encoder.pt", model, model=weights)).digest() == model.digest()


def test_every_misfit_is_listed(tmp_path: Path, model: LatentAutoencoder) -> None:
    weights = dict(model.state_dict())
    del weights["encoder.fc.bias"]
    weights["encoder.extra"] = torch.zeros(1)
    weights["decoder.final.1.bias"] = torch.zeros(5)
    with pytest.raises(WeightsError) as caught:
        load_encoder(save(tmp_path / "encoder.pt", model, model=weights))
    message = str(caught.value)
    assert "missing 1: encoder.fc.bias" in message
    assert "unexpected 1: encoder.extra" in message
    assert "decoder.final.1.bias is [5], expected [4]" in message


@pytest.mark.parametrize("config", [{"hidden_dims": []}, {"latent_dim": -1}, {"in_channels": "16"}])
def test_a_senseless_config_is_refused(tmp_path: Path, model: LatentAutoencoder, config: dict[str, object]) -> None:
    path = save(tmp_path / "encoder.pt", model, config=asdict(SIZES) | config)
    with pytest.raises(WeightsError, match=next(iter(config))):
        load_encoder(path)


def test_a_file_without_config_says_what_it_holds(tmp_path: Path, model: LatentAutoencoder) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    with pytest.raises(WeightsError, match=r"state_dict.*expected 'config' and 'model'"):
        load_encoder(path)


def test_seq_delta_counts_only_pairs_above_the_margin() -> None:
    # Frames 0 and 1 are parallel (cosine 1), frame 2 is orthogonal to both.
    embeddings = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]])
    config = LossConfig(delta_margin=0.5, delta_weight=2.0, delta_window=2)
    offset_1, offset_2 = (0.5 + 0) / 2, 0.0
    torch.testing.assert_close(seq_delta(embeddings, config), torch.tensor(2.0 * (offset_1 + offset_2) / 2))


def test_smoothness_needs_three_frames_and_a_weight() -> None:
    straight = torch.tensor([[[0.0], [1.0], [2.0]]])
    bent = torch.tensor([[[0.0], [1.0], [0.0]]])
    torch.testing.assert_close(smoothness(bent, LossConfig(smooth_weight=0.5)), torch.tensor(0.5 * 2.0))
    assert smoothness(straight, LossConfig()) < 1e-3
    assert smoothness(bent, LossConfig(smooth_weight=0)) == 0
    assert smoothness(bent[:, :2], LossConfig()) == 0


def test_training_lowers_the_loss(model: LatentAutoencoder) -> None:
    batch = torch.randn(2, 4, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    optimizer = make_optimizer(model, OptimizerConfig(lr=3e-3))
    totals = [float(train_step(model, optimizer, batch, LossConfig()).losses.total) for _ in range(20)]
    assert totals[-1] < 0.7 * totals[0]


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (9, 13)])
def test_convolutions_as_matrix_products_give_the_same_embeddings_from_the_same_weights(size: tuple[int, int]) -> None:
    encoder = LatentAutoencoder(EncoderConfig(16, *size, 24, (8, 16)))
    fill_random(encoder, seed=4)
    encoder.requires_grad_(False)
    products = encoder.by_products()
    latents = torch.randn(3, 16, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(products.encode(latents), encoder.encode(latents), rtol=0, atol=1e-6)
    assert not any(isinstance(module, torch.nn.Conv2d) for module in products.encoder.modules())
    assert {p.data_ptr() for p in products.parameters()} == {p.data_ptr() for p in encoder.parameters()}
    assert any(isinstance(module, torch.nn.Conv2d) for module in encoder.encoder.modules())

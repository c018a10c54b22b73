"""The VAE against the public one's recorded outputs, and its loaders against good and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.vae import WanVae, load_wan_vae, tiny_vae, video_frames

TINY = {"base_dim": 8}
OTHER_CPU = 1e-5
"""Largest difference from what a CPU with other vector units recorded: its sums differ in the last bits."""


@pytest.fixture(scope="module")
def tensors(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "vae" / "tiny_vae.safetensors")


@pytest.fixture(scope="module")
def vae(golden: Path) -> WanVae:
    return load_wan_vae(golden / "vae" / "tiny_vae_Wan2.1_VAE.pth", config=TINY)


def test_whole_decode_matches_the_public_one(vae: WanVae, tensors: dict[str, Tensor]) -> None:
    ours = vae.decode(tensors["latent_btchw"][0])
    public = tensors["decode_raw"][0].clamp(-1, 1).transpose(0, 1)
    assert ours.shape[0] == video_frames(7) == 25
    torch.testing.assert_close(ours, public, rtol=0, atol=OTHER_CPU)


def test_encode_matches_the_public_one(vae: WanVae, tensors: dict[str, Tensor]) -> None:
    ours = vae.encode(tensors["pixels_bcthw"][0].transpose(0, 1))
    torch.testing.assert_close(ours, tensors["encode_btchw"][0], rtol=0, atol=OTHER_CPU)


def test_encode_refuses_a_frame_count_that_would_lose_frames(vae: WanVae) -> None:
    with pytest.raises(ValueError, match="8 frames cannot be encoded"):
        vae.encode(torch.zeros(8, 3, 16, 16))


def test_safetensors_with_original_names_is_the_same_vae(
    vae: WanVae, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    save_file(weights, tmp_path / "vae.safetensors")
    assert load_wan_vae(tmp_path / "vae.safetensors", config=TINY).digest == vae.digest


def test_diffusers_folder_is_the_same_vae(vae: WanVae, tmp_path: Path) -> None:
    vae.model.save_pretrained(tmp_path)
    assert load_wan_vae(tmp_path).digest == vae.digest


def test_file_of_another_size_is_refused_with_a_list(golden: Path) -> None:
    with pytest.raises(WeightsError, match=r"misshapen 188: decoder\.conv_in\.bias is \[32\], expected \[384\]"):
        load_wan_vae(golden / "vae" / "tiny_vae_Wan2.1_VAE.pth")


def test_missing_tensor_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    del weights["decoder.head.2.bias"]
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match=r"missing 1: decoder\.conv_out\.bias"):
        load_wan_vae(tmp_path / "vae.safetensors", config=TINY)


def test_folder_without_a_vae_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"base_dim": 8}))
    with pytest.raises(WeightsError, match="diffusion_pytorch_model"):
        load_wan_vae(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="not a Diffusers folder"):
        load_wan_vae(tmp_path)
    # A list would make diffusers ask the Hub.
    for config in ("{", "[]", '{"base_dim": -4}', '{"base_dim": "wide"}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(WeightsError, match=r"not a Diffusers folder of a VAE: .*Fix:"):
            load_wan_vae(tmp_path)


def test_video_frames_of_whole_and_cold_decodes() -> None:
    assert video_frames(7) == 25
    assert video_frames(7, cold_chunk=3) == 19, "as recorded in golden/vae"
    assert video_frames(120, cold_chunk=60) == 474
    assert video_frames(60, cold_chunk=60) == video_frames(60) == 237


def test_tiny_vae_is_reproducible() -> None:
    assert tiny_vae(seed=0).digest == tiny_vae(seed=0).digest != tiny_vae(seed=1).digest


def test_tiny_vae_is_fit_to_be_looked_at() -> None:
    """White noise in, as a random generator makes it: colours out that are neither grey, clipped nor strobing."""
    pixels = tiny_vae().decode(torch.randn(9, 16, 8, 12, generator=torch.Generator().manual_seed(0)))
    assert pixels.shape == (33, 3, 64, 96)
    settled = pixels[9:]
    assert settled.std() > 0.15
    assert (settled.abs() >= 1).float().mean() < 0.02
    assert (settled[1:] - settled[:-1]).abs().mean() < 0.05


def test_the_model_may_be_moved_after_loading(vae: WanVae) -> None:
    """Device and precision of the model are all that counts; a buffer left behind would fail or give other values."""
    double = tiny_vae()
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    single = double.decode(latents)
    double.model.to(torch.float64)
    assert double.decode(latents).dtype == torch.float64
    torch.testing.assert_close(double.decode(latents).float(), single, rtol=0, atol=1e-4)

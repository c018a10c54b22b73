"""LoRA files: merged exactly, and refused where they do not fit. The golden files are in tests/conformance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.lora import Lora, lora_targets
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.transformer import CausalWanTransformer

CONFIG = WanConfig(dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2)
RANK = 3


@pytest.fixture(scope="module")
def transformer() -> CausalWanTransformer:
    built = CausalWanTransformer(CONFIG)
    fill_random(built, seed=1)
    return built


@pytest.fixture
def checkpoint(tmp_path: Path, transformer: CausalWanTransformer) -> Path:
    path = tmp_path / "generator.pt"
    torch.save({"generator": transformer.state_dict()}, path)
    return path


def updates(transformer: CausalWanTransformer) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    halves = {}
    for name, layer in lora_targets(transformer).items():
        key = f"base_model.model.{name}"
        halves[f"{key}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=generator)
        halves[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=generator)
    return halves


def save(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path


def test_every_linear_layer_of_the_blocks_is_a_target(transformer: CausalWanTransformer) -> None:
    assert len(lora_targets(transformer)) == 10 * CONFIG.num_layers


@pytest.mark.parametrize("wrapped", [False, True])
def test_merged_weights_compute_what_the_update_adds(
    tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer, wrapped: bool
) -> None:
    halves = updates(transformer)
    content = {"generator_lora": halves, "critic_lora": {}, "step": 3} if wrapped else halves
    lora = Lora(save(tmp_path / "lora.pt", content), rank=RANK, alpha=6.0)
    merged = load_transformer(checkpoint, CONFIG, dtype=torch.float32, lora=lora)
    for name, layer in lora_targets(transformer).items():
        x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(4))
        a, b = (halves[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        applied = layer(x) + 6.0 / RANK * (x @ a.T) @ b.T
        torch.testing.assert_close(lora_targets(merged)[name](x), applied, atol=1e-4, rtol=1e-5)
    untouched = "patch_embedding.weight"
    assert torch.equal(merged.state_dict()[untouched], transformer.state_dict()[untouched])


def test_the_merge_is_rounded_once(tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer) -> None:
    lora = Lora(save(tmp_path / "lora.pt", updates(transformer)), rank=RANK, alpha=1.0)
    exact = load_transformer(checkpoint, CONFIG, dtype=torch.float32, lora=lora).state_dict()
    half = load_transformer(checkpoint, CONFIG, dtype=torch.bfloat16, lora=lora).state_dict()
    assert all(torch.equal(half[name], exact[name].to(torch.bfloat16)) for name in exact)


def test_misfits_are_listed(tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer) -> None:
    halves = updates(transformer)
    del halves["base_model.model.blocks.1.ffn.2.lora_B.weight"]
    halves["base_model.model.head.head.lora_A.weight"] = torch.zeros(RANK, 24)
    path = save(tmp_path / "lora.pt", halves)
    with pytest.raises(WeightsError) as caught:
        load_transformer(checkpoint, CONFIG, lora=Lora(path, rank=RANK, alpha=1.0))
    assert "missing 1: blocks.1.ffn.2.B" in str(caught.value)
    assert "unexpected 1: head.head.A" in str(caught.value)


def test_an_update_that_is_not_finite_is_told(
    tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer
) -> None:
    halves = updates(transformer)
    halves["base_model.model.blocks.1.ffn.2.lora_B.weight"][0, 0] = float("nan")
    path = save(tmp_path / "lora.pt", halves)
    with pytest.raises(
        WeightsError, match=r"with LoRA .*lora\.pt holds NaN or infinite .*: blocks\.1\.ffn\.2\.weight\."
    ):
        load_transformer(checkpoint, CONFIG, lora=Lora(path, rank=RANK, alpha=1.0))


def test_the_rank_of_the_file_is_told(tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer) -> None:
    path = save(tmp_path / "lora.pt", updates(transformer))
    with pytest.raises(WeightsError, match="the file has rank 3"):
        load_transformer(checkpoint, CONFIG, lora=Lora(path, rank=4, alpha=4.0))


@pytest.mark.parametrize("content", [{}, {"generator": {"x": torch.zeros(1)}}, {"generator_lora": [1]}])
def test_another_kind_of_file_is_refused(tmp_path: Path, checkpoint: Path, content: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="LoRA"):
        load_transformer(checkpoint, CONFIG, lora=Lora(save(tmp_path / "lora.pt", content)))

"""LoRA files: merged exactly, and refused where they do not fit. The golden files are in tests/conformance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.lora import Lora, lora_targets, read_lora
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
    halves["base_model.model.blocks.7.ffn.2.lora_A.weight"] = torch.zeros(RANK, 32)
    halves["base_model.model.blocks.7.ffn.2.lora_B.weight"] = torch.zeros(24, RANK)
    halves["base_model.model.blocks.1.ffn.2.lora_B.weight"] = torch.zeros(25, RANK)
    path = save(tmp_path / "lora.pt", halves)
    with pytest.raises(WeightsError) as caught:
        load_transformer(checkpoint, CONFIG, lora=Lora(path))
    assert "unexpected 2: blocks.7.ffn.2.A, blocks.7.ffn.2.B" in str(caught.value)
    assert "misshapen 1: blocks.1.ffn.2.B is [25, 3], expected [24, 3]" in str(caught.value)


def test_a_half_without_the_other_is_named(tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer) -> None:
    halves = updates(transformer)
    del halves["base_model.model.blocks.1.ffn.2.lora_B.weight"]
    with pytest.raises(WeightsError, match=r"missing 1: blocks\.1\.ffn\.2\.B"):
        load_transformer(checkpoint, CONFIG, lora=Lora(save(tmp_path / "lora.pt", halves)))


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


LAYER = "blocks.1.cross_attn.o"
"""The layer by which strengths are looked at."""


def plain(transformer: CausalWanTransformer) -> dict[str, tuple[Tensor, Tensor]]:
    """Both halves by Wan's name of the layer."""
    halves = updates(transformer)
    return {
        name: (halves[f"base_model.model.{name}.lora_A.weight"], halves[f"base_model.model.{name}.lora_B.weight"])
        for name in lora_targets(transformer)
    }


DIFFUSERS = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def diffusers(name: str) -> str:
    _, block, layer = name.split(".", 2)
    return f"blocks.{block}.{DIFFUSERS[layer]}"


SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "LongLive": (lambda name: f"base_model.model.{name}", "lora_A.weight", "lora_B.weight"),
    "PEFT": (lambda name: f"base_model.model.model.{name}", "lora_A.default.weight", "lora_B.default.weight"),
    "Diffusers": (lambda name: f"transformer.{diffusers(name)}", "lora_A.weight", "lora_B.weight"),
    "older Diffusers": (lambda name: f"transformer.{diffusers(name)}", "lora.down.weight", "lora.up.weight"),
    "ComfyUI": (lambda name: f"diffusion_model.{name}", "lora_A.weight", "lora_B.weight"),
    "ComfyUI, down and up": (lambda name: f"diffusion_model.{name}", "lora_down.weight", "lora_up.weight"),
    "kohya": (lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "kohya of Diffusers": (
        lambda name: f"lora_unet_{diffusers(name).replace('.', '_')}",
        "lora_down.weight",
        "lora_up.weight",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("part", ["all layers", "attention alone"])
def test_every_spelling_is_the_same_update(
    tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer, spelling: str, part: str
) -> None:
    name_of, down, up = SPELLINGS[spelling]
    wanted = {name: pair for name, pair in plain(transformer).items() if part == "all layers" or "attn" in name}
    stored: dict[str, Tensor] = {}
    for name, (a, b) in wanted.items():
        stored |= {f"{name_of(name)}.{down}": a, f"{name_of(name)}.{up}": b}
    save_file(stored, tmp_path / "lora.safetensors")
    merged = load_transformer(
        checkpoint, CONFIG, dtype=torch.float32, lora=Lora(tmp_path / "lora.safetensors")
    ).state_dict()
    before = transformer.state_dict()
    for name in before:
        layer = name.removesuffix(".weight")
        expected = before[name] + wanted[layer][1] @ wanted[layer][0] if layer in wanted else before[name]
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-5)


def peft(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 12, "bias": "none", **changes}


@pytest.mark.parametrize(
    ("alpha_keys", "beside", "metadata", "configured", "scale"),
    [
        (None, None, {}, None, 1.0),
        (None, None, {}, 6.0, 2.0),
        (6.0, None, {}, None, 2.0),
        (6.0, None, {}, 6.0, 2.0),
        (None, peft(), {}, None, 4.0),
        (None, peft(use_rslora=True), {}, None, 12 / math.sqrt(RANK)),
        (None, peft(alpha_pattern={"cross_attn.o": 3}), {}, None, 1.0),
        (None, peft(alpha_pattern={r".*\.blocks\.1\..*_attn\.o": 3}), {}, None, 4.0),
        (None, peft(alpha_pattern={r"blocks\.\d\.cross_attn\.o": 3}), {}, None, 1.0),
        (None, peft(r=8, rank_pattern={"blocks": 8, "o": RANK, "[qkv]": RANK, "0": RANK, "2": RANK}), {}, None, 4.0),
        (None, None, {"ss_network_alpha": "1.5", "ss_network_dim": "3"}, None, 0.5),
        (6.0, None, {"ss_network_alpha": "1.5"}, None, 2.0),
        (
            None,
            None,
            {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 9})},
            None,
            3.0,
        ),
    ],
)
def test_the_strength_is_that_of_the_file_else_one(
    tmp_path: Path,
    transformer: CausalWanTransformer,
    alpha_keys: float | None,
    beside: dict[str, Any] | None,
    metadata: dict[str, str],
    configured: float | None,
    scale: float,
) -> None:
    stored = {name.removeprefix("base_model.model."): value for name, value in updates(transformer).items()}
    if alpha_keys is not None:
        stored |= {
            f"{name}.alpha": torch.tensor(alpha_keys, dtype=torch.bfloat16) for name in lora_targets(transformer)
        }
    save_file(stored, tmp_path / "adapter_model.safetensors", metadata=metadata)
    if beside is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    for path in (tmp_path / "adapter_model.safetensors", tmp_path):
        update = read_lora(Lora(path, alpha=configured))[LAYER]
        assert update.scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("entries", "scale"),
    [
        ({"lora_alpha": 6}, 2.0),
        ({"rank": 0, "step": 3}, 1.0),
        ({"lora_config": {"rank": RANK, "alpha": 6}}, 2.0),
        ({"config": {"ema": {"alpha": 0.9}, "adapter": {"type": "lora", "rank": RANK, "alpha": 1.5}}}, 0.5),
        ({"peft_config": {"default": peft(use_rslora=True)}}, 12 / math.sqrt(RANK)),
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_settings_that_a_trainer_saves_in_the_file_count(
    tmp_path: Path, transformer: CausalWanTransformer, entries: dict[str, Any], scale: float, wrapped: bool
) -> None:
    halves = updates(transformer)
    path = save(tmp_path / "lora.pt", {"generator_lora": halves, **entries} if wrapped else {**halves, **entries})
    (found,) = {update.scale for update in read_lora(Lora(path)).values()}
    assert found == pytest.approx(scale)


def test_settings_in_the_metadata_count(tmp_path: Path, transformer: CausalWanTransformer) -> None:
    metadata = {"format": "pt", "notes": "{not JSON", "lora_config": json.dumps({"rank": RANK, "alpha": 6})}
    save_file(updates(transformer), tmp_path / "lora.safetensors", metadata=metadata)
    assert {update.scale for update in read_lora(Lora(tmp_path / "lora.safetensors")).values()} == {2.0}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"lora_config": {"rank": 8, "alpha": 6}}, "entry lora_config of .* says rank 8 for .*, the tensors have 3"),
        ({"rank": 8, "alpha": 6}, "entry alpha of .* says rank 8 for"),
        ({"lora_config": {"rank": RANK, "alpha": 6, "use_dora": True}}, "names DoRA"),
        ({"alpha": 6, "lora_config": {"rank": RANK, "alpha": 12}}, "says alpha 6, entry lora_config of .* says 12"),
        ({"alpha": math.inf}, "gives inf as a rank or alpha"),
    ],
)
def test_settings_in_the_file_that_contradict_are_refused(
    tmp_path: Path, transformer: CausalWanTransformer, entries: dict[str, Any], said: str
) -> None:
    with pytest.raises(WeightsError, match=f"{said}(.|\n)*Fix: "):
        read_lora(Lora(save(tmp_path / "lora.pt", {"generator_lora": updates(transformer), **entries})))


def test_the_rank_of_kohyas_metadata_must_be_that_of_the_tensors(
    tmp_path: Path, transformer: CausalWanTransformer
) -> None:
    metadata = {"ss_network_alpha": "2", "ss_network_dim": "8"}
    save_file(updates(transformer), tmp_path / "lora.safetensors", metadata=metadata)
    with pytest.raises(WeightsError, match=r"ss_network_alpha of .* says rank 8 for .*, the tensors have 3"):
        read_lora(Lora(tmp_path / "lora.safetensors"))


def test_layers_may_have_ranks_and_alphas_of_their_own(
    tmp_path: Path, checkpoint: Path, transformer: CausalWanTransformer
) -> None:
    first, second = "blocks.0.self_attn.q", "blocks.1.ffn.2"
    stored = {
        f"{first}.lora_A.weight": torch.ones(2, 24),
        f"{first}.lora_B.weight": torch.ones(24, 2),
        f"{first}.alpha": torch.tensor(1.0),
        f"{second}.lora_A.weight": torch.ones(5, 32),
        f"{second}.lora_B.weight": torch.ones(24, 5),
        f"{second}.alpha": torch.tensor([20.0]),
    }
    save_file(stored, tmp_path / "lora.safetensors")
    merged = load_transformer(checkpoint, CONFIG, dtype=torch.float32, lora=Lora(tmp_path / "lora.safetensors"))
    before = transformer.state_dict()
    torch.testing.assert_close(merged.state_dict()[f"{first}.weight"], before[f"{first}.weight"] + 2 * 0.5)
    torch.testing.assert_close(merged.state_dict()[f"{second}.weight"], before[f"{second}.weight"] + 5 * 4.0)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, Lora, str]] = {
    "configuration": (
        {f"{LAYER}.alpha": 6.0},
        None,
        Lora("", alpha=3.0),
        "says alpha 6 .scale 2., the configuration says 3",
    ),
    "adapter_config": ({}, peft(), Lora("", alpha=3.0), "adapter_config.json says alpha 12"),
    "two sources": ({f"{LAYER}.alpha": 6.0}, peft(), Lora(""), "alpha says alpha 6, .*adapter_config.json says 12"),
    "another adapter": ({}, peft(r=8), Lora(""), "says rank 8 for .*, the tensors have 3"),
    "rank": ({}, None, Lora("", rank=4), "the file has rank 3, the configuration says 4"),
    "no strength": ({f"{LAYER}.alpha": 0.0}, None, Lora(""), "alpha is 0.0, which loaders read differently"),
    "DoRA": ({}, peft(use_dora=True), Lora(""), "names DoRA"),
    "DoRA by its tensors": ({f"{LAYER}.lora_magnitude_vector": 1.0}, None, Lora(""), "is a DoRA"),
    "DoRA of kohya": ({f"{LAYER}.dora_scale": 1.0}, None, Lora(""), "is a DoRA"),
    "LoHa": ({f"{LAYER}.hada_w1_a": 1.0}, None, Lora(""), "is a LoHa"),
    "LoKr": ({f"{LAYER}.lokr_w1": 1.0}, None, Lora(""), "is a LoKr"),
    "bias": ({f"{LAYER}.diff_b": 1.0}, None, Lora(""), "whole weight or bias differences"),
    "text encoder": ({"lora_te_encoder_block_0.alpha": 1.0}, None, Lora(""), "also updates a text encoder"),
    "another method": ({}, {"peft_type": "IA3"}, Lora(""), "names IA3 instead of LoRA"),
    "PiSSA": ({}, peft(init_lora_weights="pissa"), Lora(""), "changed the base weights"),
    "unknown layer": (
        {"lora_unet_blocks_0_nothing.alpha": 1.0},
        None,
        Lora(""),
        "holds lora_unet_blocks_0_nothing.alpha",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_cannot_be_merged_exactly_is_refused_by_name(
    tmp_path: Path, transformer: CausalWanTransformer, what: str
) -> None:
    more, beside, lora, said = CONTRADICTIONS[what]
    stored = {name.removeprefix("base_model.model."): value for name, value in updates(transformer).items()}
    save_file(stored | {name: torch.tensor(value) for name, value in more.items()}, tmp_path / "lora.safetensors")
    if beside is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
    with pytest.raises(WeightsError, match=f"{said}(.|\n)*Fix: "):
        read_lora(lora._replace(path=tmp_path / "lora.safetensors"))

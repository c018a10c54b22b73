"""Generator checkpoints: what loads, what is refused and what is said. The golden files are in tests/conformance."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.policy import Layout, PolicyInputs
from lrag_ray.context.runtime import ContextRuntime
from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer, state_dict_digest
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.rope import Rope
from tests.wan.make import CONFIG, State, wrapped

LAYOUTS: dict[str, tuple[bool, Callable[[State], dict[str, Any]]]] = {
    "generator": (False, lambda s: {"generator": wrapped(s), "step": 7}),
    "ema behind fsdp": (True, lambda s: {"generator_ema": wrapped(s, "_fsdp_wrapped_module.")}),
    "fsdp without ema": (False, lambda s: {"generator": wrapped(s, "_fsdp_wrapped_module.")}),
    "model": (True, lambda s: {"model": wrapped(s)}),
    "bare": (False, lambda s: s),
    "data parallel": (False, lambda s: {"generator": {f"module.{name}": value for name, value in wrapped(s).items()}}),
    "compiled": (True, lambda s: {"generator_ema": wrapped(s, "_orig_mod.")}),
    "ComfyUI": (False, lambda s: {f"diffusion_model.{name}": value for name, value in s.items()}),
    "ComfyUI, whole model": (
        True,
        lambda s: (
            {f"model.diffusion_model.{name}": value for name, value in s.items()}
            | {"first_stage_model.decoder.conv1.weight": torch.zeros(1)}
        ),
    ),
    "flat generator alone": (False, lambda s: {f"generator.{name}": value for name, value in wrapped(s).items()}),
    "DeepSpeed": (False, lambda s: {"model": {f"module._forward_module.{name}": value for name, value in s.items()}}),
    "PEFT without its LoRA": (
        False,
        lambda s: {
            "generator": {
                f"model.base_model.model.{name.replace('.q.', '.q.base_layer.')}": value for name, value in s.items()
            }
        },
    ),
    "flat": (True, lambda s: {f"generator_ema.{name}": value for name, value in wrapped(s).items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_loads_the_same_weights(tmp_path: Path, state: State, layout: str) -> None:
    use_ema, build = LAYOUTS[layout]
    path = tmp_path / "generator.pt"
    torch.save(build(state), path)
    loaded = load_transformer(path, CONFIG, use_ema=use_ema, dtype=torch.float32)
    assert state_dict_digest(loaded.state_dict()) == state_dict_digest(state)
    assert not loaded.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())


def test_safetensors_load_whatever_their_suffix(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.bin"
    save_file(state, path)
    loaded = load_transformer(path, CONFIG, dtype=torch.float32)
    assert state_dict_digest(loaded.state_dict()) == state_dict_digest(state)


def test_weights_are_cast_to_the_asked_precision(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    torch.save({"generator": wrapped(state)}, path)
    loaded = load_transformer(path, CONFIG, dtype=torch.bfloat16)
    rounded = {name: value.to(torch.bfloat16) for name, value in state.items()}
    assert state_dict_digest(loaded.state_dict()) == state_dict_digest(rounded)


def test_digest_tells_names_values_and_types_apart() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    assert state_dict_digest(base) == state_dict_digest(dict(reversed(base.items())))
    others: list[State] = [
        {"a": base["a"], "c": base["b"]},
        base | {"a": torch.zeros(3, 2)},
        base | {"a": torch.zeros(2, 3, dtype=torch.float64)},
        base | {"b": torch.zeros(1)},
    ]
    assert len({state_dict_digest(other) for other in [base, *others]}) == 5


ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole numbers": lambda x: x.long(),
    "truth values": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "eight bits": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "without values": lambda x: x.to("meta"),
}


def broken(state: State, how: str) -> dict[str, Any]:
    changed = wrapped(state)
    if how == "missing":
        del changed["model.blocks.1.ffn.0.weight"]
    elif how == "unexpected":
        changed["model.blocks.1.ffn.1.weight"] = torch.zeros(1)
    elif how == "misshapen":
        changed["model.head.head.bias"] = torch.zeros(63)
    elif how == "ambiguous":
        changed["model._fsdp_wrapped_module.head.head.bias"] = changed["model.head.head.bias"]
    elif how in ODD_TENSORS:
        changed["model.head.head.bias"] = ODD_TENSORS[how](changed["model.head.head.bias"])
    elif how == "no tensor":
        return {"generator": changed | {"model.head.head.bias": [0.0] * 64}}
    return {"generator": changed}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "missing 1: blocks.1.ffn.0.weight"),
        ("unexpected", "unexpected 1: blocks.1.ffn.1.weight"),
        ("misshapen", r"head.head.bias is \[63\], expected \[64\]"),
        ("ambiguous", "'head.head.bias' twice"),
        ("no tensor", "misshapen 1: head.head.bias"),
        ("whole numbers", "of another kind 1: head.head.bias is int64"),
        ("truth values", "head.head.bias is bool"),
        ("complex", "head.head.bias is complex64, expected bfloat16 or float32"),
        ("eight bits", "of another kind 1: head.head.bias is float8_e4m3fn, expected bfloat16 or float32"),
        ("sparse", "head.head.bias is sparse"),
        ("without values", "head.head.bias is without values"),
    ],
)
def test_a_misfit_is_named_and_never_loaded(tmp_path: Path, state: State, how: str, said: str) -> None:
    path = tmp_path / "generator.pt"
    torch.save(broken(state, how), path)
    with pytest.raises(WeightsError, match=said):
        load_transformer(path, CONFIG)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, state: State, value: float, dtype: torch.dtype) -> None:
    path = tmp_path / "generator.safetensors"
    other = {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}
    other["blocks.1.ffn.0.weight"][3, 4] = value
    save_file(other, path)
    said = rf"{path.name} holds NaN or infinite values in 1 of {len(state)} tensors: blocks.1.ffn.0.weight\. Fix:"
    with pytest.raises(WeightsError, match=said):
        load_transformer(path, CONFIG)


def test_other_sizes_are_told_from_the_file(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    torch.save({"generator": wrapped(state)}, path)
    with pytest.raises(WeightsError, match="num_layers: 2"):
        load_transformer(path, dataclasses.replace(CONFIG, num_layers=3))


@pytest.mark.parametrize(
    ("content", "use_ema", "said"),
    [
        ({"state_dict": {}}, False, "state_dict at the top level.*Fix: give a generator checkpoint$"),
        ({"state_dict": {"x": torch.zeros(1)}, "epoch": 3}, False, "or rename state_dict to generator if it is one"),
        ({"optimizer": {"state": {}}, "epoch": 3}, False, "Fix: give a generator checkpoint$"),
        ({"generator_lora": {"x": torch.zeros(1)}, "step": 3}, False, r"weights\.lora\.path takes this LoRA"),
        ({"generator": {}}, True, "use_ema: false"),
        ({"generator_ema": {}}, False, "use_ema: true"),
        ({"generator": 3}, False, "'generator' is a int"),
    ],
)
def test_the_wrong_top_level_is_explained(tmp_path: Path, content: dict[str, Any], use_ema: bool, said: str) -> None:
    path = tmp_path / "generator.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=said):
        load_transformer(path, CONFIG, use_ema=use_ema)


def test_tensors_that_share_storage_are_no_damage(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    name = "blocks.0.self_attn.q.weight"
    other = state | {name: state[name].t().contiguous().t()}
    torch.save({"generator": wrapped(other), "generator_ema": wrapped(other), "step": 3, "more": [other[name]]}, path)
    assert state_dict_digest(load_transformer(path, CONFIG, dtype=torch.float32).state_dict()) == state_dict_digest(
        state
    )


def diffusers_transformer() -> WanTransformer3DModel:
    """Diffusers' own model with random weights, in the sizes of CONFIG."""
    model = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def test_a_diffusers_transformer_computes_the_same_here(tmp_path: Path) -> None:
    """Given Diffusers' folder, in parts with an index, the loaded generator equals its own model on one latent frame,
    where causal attention is attention; the file alone gives the same weights."""
    theirs = diffusers_transformer()
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 2
    ours = load_transformer(tmp_path / "transformer", CONFIG, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "whole")
    alone = load_transformer(tmp_path / "whole" / "diffusion_pytorch_model.safetensors", CONFIG, dtype=torch.float32)
    assert state_dict_digest(alone.state_dict()) == state_dict_digest(ours.state_dict())

    latents, text = torch.randn(1, 1, 16, 6, 8), torch.randn(1, CONFIG.text_len, CONFIG.text_dim)
    t = torch.tensor([[625.0]])
    device = torch.device("cpu")
    grid = CONFIG.token_grid(6, 8)
    rope = Rope(CONFIG.head_dim, grid, device)
    layout = Layout(CONFIG.num_layers, CONFIG.num_heads, CONFIG.head_dim, grid, 1, torch.float32, device)
    context = ContextRuntime(layout, rope, [Base(BaseSettings(), PolicyInputs(layout, rope))])
    context.begin_block(0)
    context.begin_pass(0, clean=True)
    flow = ours(latents, t, ours.embed_text(text), context)
    expected = theirs(latents.transpose(1, 2), t[0], text, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(flow, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_of_other_heads_is_refused_although_its_shapes_fit(tmp_path: Path) -> None:
    diffusers_transformer().save_pretrained(tmp_path / "transformer")
    other = dataclasses.replace(CONFIG, num_heads=CONFIG.num_heads * 2)
    with pytest.raises(
        WeightsError, match=r"config\.json says num_heads: 2, the configuration num_heads: 4(.|\n)*Fix: "
    ):
        load_transformer(tmp_path / "transformer", other)


def test_the_sizes_that_are_named_make_the_file_fit(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    torch.save({"generator": wrapped(state)}, path)
    wrong = WanConfig(dim=48, ffn_dim=64, freq_dim=8, text_dim=4, text_len=4, num_heads=4, num_layers=5)
    with pytest.raises(WeightsError, match="set transformer sizes to those of the file") as caught:
        load_transformer(path, wrong)
    named = re.search(r"those of the file \((.*?)\)", str(caught.value))
    assert named is not None
    sizes: dict[str, Any] = {name: int(size) for name, size in re.findall(r"(\w+): (\d+)", named[1])}
    load_transformer(path, dataclasses.replace(wrong, **sizes))

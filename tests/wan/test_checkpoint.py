"""Generator checkpoints: what loads, what is refused and what is said. The golden files are in tests/conformance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer, state_dict_digest
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.transformer import CausalWanTransformer

CONFIG = WanConfig(dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    transformer = CausalWanTransformer(CONFIG)
    fill_random(transformer, seed=1)
    return dict(transformer.state_dict())


def wrapped(state: State, inner: str = "") -> State:
    return {f"model.{inner}{name}": value for name, value in state.items()}


LAYOUTS: dict[str, tuple[bool, Callable[[State], dict[str, Any]]]] = {
    "generator": (False, lambda s: {"generator": wrapped(s), "step": 7}),
    "ema behind fsdp": (True, lambda s: {"generator_ema": wrapped(s, "_fsdp_wrapped_module.")}),
    "fsdp without ema": (False, lambda s: {"generator": wrapped(s, "_fsdp_wrapped_module.")}),
    "model": (True, lambda s: {"model": wrapped(s)}),
    "bare": (False, lambda s: s),
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
        {"a": base["b"], "b": base["a"]},
        base | {"a": torch.zeros(3, 2)},
        base | {"a": torch.zeros(2, 3, dtype=torch.float64)},
        base | {"b": torch.zeros(1)},
    ]
    assert len({state_dict_digest(other) for other in [base, *others]}) == 5


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
    ],
)
def test_a_misfit_is_named_and_never_loaded(tmp_path: Path, state: State, how: str, said: str) -> None:
    path = tmp_path / "generator.pt"
    torch.save(broken(state, how), path)
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
        ({"state_dict": {}}, False, "state_dict at the top level"),
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


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, state: State, suffix: str) -> None:
    path = tmp_path / f"generator{suffix}"
    if suffix == ".pt":
        torch.save({"generator": wrapped(state)}, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="compare its size with the source"):
        load_transformer(path, CONFIG)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "generator.pt"
    torch.save({"generator": Harmful()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="refused"):
        load_transformer(path, CONFIG)
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not there"):
        load_transformer(tmp_path / "absent.pt", CONFIG)
    with pytest.raises(WeightsError, match="a folder"):
        load_transformer(tmp_path, CONFIG)
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    with pytest.raises(WeightsError, match="no torch file"):
        load_transformer(tmp_path / "page.pt", CONFIG)
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match="0 bytes"):
        load_transformer(tmp_path / "empty.pt", CONFIG)

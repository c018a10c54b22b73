"""Generator checkpoints: what loads, what is refused and what is said. The golden files are in tests/conformance."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer, mapped_transformer, state_dict_digest
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
    "data parallel": (False, lambda s: {"generator": {f"module.{name}": value for name, value in wrapped(s).items()}}),
    "compiled": (True, lambda s: {"generator_ema": wrapped(s, "_orig_mod.")}),
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


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "I8"])
def test_another_precision_is_told_from_the_header_alone(tmp_path: Path, state: State, dtype: str) -> None:
    path = tmp_path / "generator.safetensors"
    whole = save(state)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    bits, at = {"F4": 4, "F6_E2M3": 6}.get(dtype, 8), 0
    for entry in header.values():
        size = math.prod(entry["shape"]) * bits // 8
        entry |= {"dtype": dtype, "data_offsets": [at, at + size]}
        at += size
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + bytes(at))
    with pytest.raises(WeightsError, match=r"expected bfloat16 or float32(.|\n)*(Mend|Fix):") as refusal:
        mapped_transformer(path, CONFIG)
    assert "compare its size" not in str(refusal.value), "the file is whole"


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


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    with pytest.raises(WeightsError, match=r"loop\.pt is a symbolic link that leads to itself;"):
        load_transformer(tmp_path / "loop.pt", CONFIG)
    (tmp_path / "lost.pt").symlink_to("old/generator.pt")
    with pytest.raises(WeightsError, match=r"lost\.pt is a symbolic link to old/generator\.pt, which is not there;"):
        load_transformer(tmp_path / "lost.pt", CONFIG)


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


def saved(state: State, form: str) -> bytes:
    buffer = io.BytesIO()
    if form == "safetensors":
        return save(state)
    torch.save({"generator": wrapped(state)}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["zip", "pickle", "safetensors"])
def test_wherever_a_file_is_cut_off_it_is_refused_with_a_mend(tmp_path: Path, state: State, form: str) -> None:
    path = tmp_path / ("generator.safetensors" if form == "safetensors" else "generator.pt")
    whole = saved(state, form)
    for end in [*range(0, 70, 3), *range(100, len(whole), len(whole) // 11), *range(len(whole) - 30, len(whole), 7)]:
        path.write_bytes(whole[:end])
        with pytest.raises(WeightsError, match="(Mend|Fix):"):
            load_transformer(path, CONFIG)


def repacked(whole: bytes, *, compressed: bool = False, halved: bool = False, emptied: bool = False) -> bytes:
    """A torch archive whose tensors were changed behind torch's back."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for name in source.namelist():
            content = source.read(name)
            if "/data/" not in name:
                target.writestr(name, content)
            elif not emptied:
                target.writestr(name, content[: len(content) // 2] if halved else content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compressed": True}, "tensors are compressed"),
        ({"halved": True}, "tensors of other sizes"),
        ({"emptied": True}, "cannot be read"),
    ],
)
def test_an_archive_that_would_be_mapped_as_garbage_is_refused(
    tmp_path: Path, state: State, change: dict[str, bool], said: str
) -> None:
    path = tmp_path / "generator.pt"
    path.write_bytes(repacked(saved(state, "zip"), **change))
    with pytest.raises(WeightsError, match=said):
        load_transformer(path, CONFIG)


def test_tensors_that_share_storage_are_no_damage(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    name = "blocks.0.self_attn.q.weight"
    other = state | {name: state[name].t().contiguous().t()}
    torch.save({"generator": wrapped(other), "generator_ema": wrapped(other), "step": 3, "more": [other[name]]}, path)
    assert state_dict_digest(load_transformer(path, CONFIG, dtype=torch.float32).state_dict()) == state_dict_digest(
        state
    )


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:7cace0da2b44\nsize 5676070424\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("generator.pt", b"", "is empty"),
        ("generator.pt", LFS, "Git LFS pointer to a file of 5,676,070,424 bytes"),
        ("generator.safetensors", LFS, "Git LFS pointer"),
        ("generator.safetensors", b"<!DOCTYPE html><title>404</title>", "a web page"),
        ("generator.pt", b"\n<html>log in, please \xc3", "a web page"),
        ("generator.pt", b'{"error": "Invalid user name"}', 'is text .it begins with \'{"error"'),
        ("model.safetensors.index.json", b'{"metadata": {"total_size": 1}, "weight_map": {}}', "split over several"),
        ("generator.pt", b"\x1f\x8b\x08" + bytes(99), "gzip archive"),
        ("generator.pt", bytes(999), "neither a torch file nor a safetensors file"),
        ("generator.safetensors", struct.pack("<Q", 10**12) + b"{}", "does not begin as such a file does"),
        ("generator.safetensors", struct.pack("<Q", 10) + b'{"a": 1, "b": 2}', "cannot be read"),
        ("generator.pt", b"PK\x05\x06" + bytes(18), "torch did not write"),
    ],
)
def test_mixed_up_downloads_are_told(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=said) as refusal:
        load_transformer(path, CONFIG)
    assert re.search("(Mend|Fix):", str(refusal.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    path.write_bytes(saved(state, "zip"))
    path.chmod(0)
    with pytest.raises(WeightsError, match=r"cannot be read: .*Mend"):
        load_transformer(path, CONFIG)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "generator.pt"
    torch.save({"generator": Harmful()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="refused: it holds getattr, which is no tensor") as refusal:
        load_transformer(path, CONFIG)
    # torch's own text advises to load with code execution allowed.
    assert "weights_only" not in str(refusal.value)
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not there"):
        load_transformer(tmp_path / "absent.pt", CONFIG)
    with pytest.raises(WeightsError, match="a folder"):
        load_transformer(tmp_path, CONFIG)
    for content in ([1, 2], torch.zeros(2), 7):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(WeightsError, match=r"expected a dict of tensors\. Mend:"):
            load_transformer(tmp_path / "other.pt", CONFIG)

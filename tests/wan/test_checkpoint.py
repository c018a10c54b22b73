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
from diffusers import WanTransformer3DModel
from safetensors.torch import save, save_file
from torch import Tensor

from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.policy import Layout, PolicyInputs
from lrag_ray.context.runtime import ContextRuntime
from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer, mapped_transformer, state_dict_digest
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.rope import Rope
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
    with pytest.raises(WeightsError, match=r"expected bfloat16 or float32(.|\n)*Fix:") as refusal:
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
def test_wherever_a_file_is_cut_off_it_is_refused_with_a_fix(tmp_path: Path, state: State, form: str) -> None:
    path = tmp_path / ("generator.safetensors" if form == "safetensors" else "generator.pt")
    whole = saved(state, form)
    for end in [*range(0, 70, 3), *range(100, len(whole), len(whole) // 11), *range(len(whole) - 30, len(whole), 7)]:
        path.write_bytes(whole[:end])
        with pytest.raises(WeightsError, match=r"Fix:"):
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
        ("gen-Q4_0.gguf", b"GGUF\x03" + bytes(99), r"is a GGUF file .weights quantised.*Fix: give the same weights as"),
        ("generator.tar", bytes(257) + b"ustar\x0000" + bytes(300), "is a tar archive"),
        ("generator.pt", b"\xfd7zXZ\x00" + bytes(99), "is an xz archive"),
        ("generator.safetensors", b"\x93NUMPY\x01" + bytes(99), "is a NumPy array"),
        ("generator.pt", b"\x00\x00\x00\x20ftypisom" + bytes(99), "is an MP4 or MOV video"),
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
    assert re.search("Fix:", str(refusal.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    path.write_bytes(saved(state, "zip"))
    path.chmod(0)
    with pytest.raises(WeightsError, match=r"cannot be read: .*Fix"):
        load_transformer(path, CONFIG)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "generator.pt"
    torch.save({"generator": Harmful()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="refused: it holds getattr, which is not a tensor") as refusal:
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
        with pytest.raises(WeightsError, match=r"expected a dict of tensors\. Fix:"):
            load_transformer(tmp_path / "other.pt", CONFIG)


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zipped(**{"release/model.pt": b"x"}), r"a zip archive that torch did not write; it holds release/model\.pt\."),
        (zipped(**{"a.npy": b"x", "b.npy": b"x"}), r"a NumPy archive \(\.npz\) of 2 arrays"),
    ],
)
def test_archives_of_others_are_named_and_never_to_be_fetched_again(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "generator.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=f"{said}(.|\n)*Fix: ") as refusal:
        load_transformer(tmp_path / "generator.pt", CONFIG)
    assert "again" not in str(refusal.value)


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


def in_parts(folder: Path, state: State, indexed: bool = True) -> list[Path]:
    """Three parts as the Hub's libraries write them, with or without their index."""
    folder.mkdir()
    names, parts = sorted(state), []
    for number in range(3):
        parts.append(folder / f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors")
        save_file({name: state[name] for name in names[number::3]}, parts[-1])
    if indexed:
        weight_map = {name: parts[i % 3].name for i, name in enumerate(names)}
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return parts


@pytest.mark.parametrize("indexed", [True, False])
def test_parts_are_joined_and_a_missing_one_is_named(tmp_path: Path, state: State, indexed: bool) -> None:
    parts = in_parts(tmp_path / "parts", state, indexed)
    loaded = load_transformer(tmp_path / "parts", CONFIG, dtype=torch.float32)
    assert state_dict_digest(loaded.state_dict()) == state_dict_digest(state)
    parts[1].unlink()
    with pytest.raises(WeightsError, match=rf"lacks {parts[1].name} \(1 of its 3 parts\)\. Fix: "):
        load_transformer(tmp_path / "parts", CONFIG)


def test_one_part_is_called_so_and_the_advice_loads(tmp_path: Path, state: State) -> None:
    parts = in_parts(tmp_path / "parts", state)
    with pytest.raises(
        WeightsError, match=r"is one part of several \(00002 of 00003\)\. Fix: give the folder of all parts, "
    ):
        load_transformer(parts[1], CONFIG)
    load_transformer(tmp_path / "parts", CONFIG)
    (tmp_path / "parts" / "config.yaml").write_text("run: {}")
    with pytest.raises(WeightsError, match=r"Fix: put all 3 parts \(and their index\) in a folder of their own"):
        load_transformer(parts[1], CONFIG)
    parts[1].rename(tmp_path / "renamed.safetensors")
    with pytest.raises(
        WeightsError, match=r"23 of the generator's 69 tensors are there, so the file may be one part"
    ) as caught:
        load_transformer(tmp_path / "renamed.safetensors", CONFIG)
    assert "num_layers:" not in str(caught.value), "no size makes a part fit"


def test_an_index_of_other_parts_is_refused(tmp_path: Path, state: State) -> None:
    parts = in_parts(tmp_path / "parts", state)
    first, second = parts[0].read_bytes(), parts[1].read_bytes()
    parts[0].write_bytes(second)
    parts[1].write_bytes(first)
    with pytest.raises(WeightsError, match="its index says that"):
        load_transformer(tmp_path / "parts", CONFIG)


def test_folders_of_other_kinds_are_named(tmp_path: Path, state: State) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        WeightsError, match=r"a whole Diffusers pipeline\. Fix: give the folder inside it, .*/transformer"
    ):
        load_transformer(tmp_path, CONFIG)
    (tmp_path / "model_index.json").unlink()
    torch.save({"generator": wrapped(state)}, tmp_path / "model.pt")
    with pytest.raises(
        WeightsError, match=r"a folder without a \.safetensors file\. Fix: give the file itself, .*/model\.pt"
    ):
        load_transformer(tmp_path, CONFIG)


def test_a_generator_with_its_lora_around_it_is_named(tmp_path: Path, state: State) -> None:
    layer = "blocks.0.self_attn.q"
    around = wrapped({name.replace(f"{layer}.", f"{layer}.base_layer."): value for name, value in state.items()})
    around[f"model.{layer}.lora_A.default.weight"] = torch.zeros(2, 24)
    around[f"model.{layer}.lora_B.default.weight"] = torch.zeros(24, 2)
    torch.save({"generator": around}, tmp_path / "generator.pt")
    with pytest.raises(WeightsError, match=r"saved with its LoRA around it by PEFT(.|\n)*Fix: merge it first"):
        load_transformer(tmp_path / "generator.pt", CONFIG)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["blocks.0.self_attn.q.lora_A.weight"], "the file is a LoRA, which weights.lora.path takes"),
        (["encoder.conv1.weight", "decoder.conv1.weight"], "the file is a VAE or a retrieval encoder"),
        (["token_embedding.weight"], "the file is a umT5 text encoder"),
        (["blocks.0.self_attn.q.scale_weight", "scaled_fp8"], "the file is quantised"),
        (["img_emb.proj.0.weight"], "an image-to-video generator"),
    ],
)
def test_weights_of_other_networks_are_named(tmp_path: Path, names: list[str], said: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=said) as refusal:
        load_transformer(tmp_path / "other.safetensors", CONFIG)
    assert "again" not in str(refusal.value)


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

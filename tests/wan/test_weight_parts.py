"""Weights in several files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer, state_dict_digest
from tests.wan.make import CONFIG, State, wrapped


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
    with pytest.raises(WeightsError, match=r"is the index of weights .*Fix: give the folder of all parts, .*/parts$"):
        load_transformer(next((tmp_path / "parts").glob("*.index.json")), CONFIG)
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


def test_a_folder_of_gguf_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "wan-Q4_0.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WeightsError, match=r"holds only GGUF files \(wan-Q4_0\.gguf.*Fix: give the same weights"):
        load_transformer(tmp_path, CONFIG)


def test_a_distributed_checkpoint_is_named_and_the_advice_loads(tmp_path: Path, state: State) -> None:
    folder = tmp_path / "step 10"
    with pytest.warns(UserWarning, match="single process"):
        save_distributed({"model": state}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(WeightsError, match=r"is a checkpoint of torch\.distributed\. Fix: convert it with") as caught:
        load_transformer(folder, CONFIG)
    command = shlex.split(str(caught.value).split("`")[1])
    assert command[:3] == ["python", "-m", dcp_to_torch_save.__module__]
    assert command[3] == "dcp_to_torch"
    dcp_to_torch_save(command[4], tmp_path / command[5])
    loaded = load_transformer(tmp_path / command[5], CONFIG, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())

"""Loading at size: one copy of the weights on the host, mapped where the file has the right dtype, and it runs.

The full 1.3B model needs about 9 GB of disk and minutes: RUN_SLOW=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.lora import lora_targets
from lrag_ray.wan.transformer import CausalWanTransformer
from tests.conftest import REPOSITORY

MODERATE = {"dim": 768, "ffn_dim": 3072, "num_layers": 10, "text_dim": 256, "text_len": 32}
SLACK_BYTES = 150e6
"""Allocator, interpreter and small tensors."""


class Files(NamedTuple):
    widths: dict[str, Any]
    weight_bytes: int
    """Of the generator in bf16."""
    pt: Path
    safetensors: Path
    float32: Path
    lora: Path


def weights(config: WanConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights with activations of order 1, drawn quickly."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CausalWanTransformer(config).state_dict().items()}
    drawn = {}
    for name, shape in shapes.items():
        scale = 1.0 if "norm" in name and name.endswith("weight") else shape[1:].numel() ** -0.5
        drawn[name] = torch.empty(shape, dtype=dtype).normal_(0, scale, generator=keyed_generator("size", name))
    return drawn


def written(folder: Path, widths: dict[str, Any], rank: int) -> Files:
    """One generator in the reference formats: EMA with FSDP names (.pt), bare (.safetensors), float32, and a LoRA."""
    config = WanConfig(**widths)
    state = weights(config, torch.bfloat16)
    files = Files(
        widths,
        sum(value.nbytes for value in state.values()),
        folder / "self_forcing.pt",
        folder / "generator.safetensors",
        folder / "float32.pt",
        folder / "lora.pt",
    )
    torch.save({"generator_ema": {f"model._fsdp_wrapped_module.{n}": v for n, v in state.items()}}, files.pt)
    save_file(state, files.safetensors)
    torch.save({"model": {f"model.{name}": value.float() for name, value in state.items()}}, files.float32)
    with torch.device("meta"):
        targets = lora_targets(CausalWanTransformer(config))
    halves = {}
    for name, layer in targets.items():
        halves[f"base_model.model.{name}.lora_A.weight"] = 0.01 * torch.randn(rank, layer.in_features)
        halves[f"base_model.model.{name}.lora_B.weight"] = 0.01 * torch.randn(layer.out_features, rank)
    torch.save({"generator_lora": halves}, files.lora)
    return files


def forget(file: Path) -> None:
    """Put the file out of the page cache, so that reading it means reading the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(files: Files, path: Path, blocks: int, lora: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.full_size.load_and_run", str(path), json.dumps(files.widths), str(blocks)]
    command += [str(lora)] if lora is not None else []
    for file in (path, lora):
        if file is not None:
            forget(file)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print("\n", path.name, "with LoRA" if lora else "", result)
    assert result["finite"] and result["shape"] == [1, 3 * blocks, 16, 8, 8]
    on_disk = path.stat().st_size + (lora.stat().st_size if lora else 0)
    assert result["disk_read_bytes"] < on_disk + SLACK_BYTES / 2, "each byte comes from the disk once"
    assert result["load_read_call_bytes"] < files.weight_bytes / 10, "mapped, not read into buffers"
    return result


def check_loading(files: Files, blocks: int) -> None:
    pt, safetensors = measured(files, files.pt, blocks), measured(files, files.safetensors, blocks)
    assert pt["digest"] == safetensors["digest"]
    for each in (pt, safetensors):
        assert each["load_peak_anon_bytes"] < SLACK_BYTES, "what has the right dtype stays mapped to the file"
    cast = measured(files, files.float32, blocks)
    assert cast["digest"] == pt["digest"]
    assert cast["load_peak_anon_bytes"] < files.weight_bytes + SLACK_BYTES, "one copy, tensor by tensor"
    merged = measured(files, files.pt, 1, files.lora)
    assert merged["load_peak_anon_bytes"] < files.weight_bytes + SLACK_BYTES, "one copy, layer by layer"


@pytest.mark.proof
def test_a_moderate_generator_is_held_once(tmp_path: Path) -> None:
    check_loading(written(tmp_path, MODERATE, rank=256), blocks=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="1.3B parameters: set RUN_SLOW=1")
def test_the_full_generator_is_held_once(tmp_path: Path) -> None:
    files = written(tmp_path, {}, rank=256)
    assert files.weight_bytes == 2 * 1_418_996_800
    check_loading(files, blocks=2)
    for file in (files.pt, files.safetensors, files.float32, files.lora):
        file.unlink()

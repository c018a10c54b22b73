"""What `verify` says of folders that hold something else, and of vectors of other sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.conformance.recording import Recording, record
from lrag_ray.conformance.verify import failed, verify_path
from lrag_ray.errors import UsageError
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.random_weights import fill_random, keyed_generator
from lrag_ray.wan.transformer import CausalWanTransformer

SIZES = {"dim": 32, "ffn_dim": 40, "freq_dim": 16, "text_dim": 8, "text_len": 5, "num_heads": 2, "num_layers": 2}


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("test_verify", name))


class Case(NamedTuple):
    """Settings in the words of golden/rollout."""

    sampler: dict[str, Any]
    kwargs: dict[str, Any]
    batch: int
    frames: int


def make_case(folder: Path, name: str, made: Case) -> None:
    """A case in the format of golden/rollout whose numbers are our own: it tests the reader, not the numbers."""
    sampler, kwargs, batch, frames = made
    transformer = CausalWanTransformer(WanConfig(**SIZES))
    fill_random(transformer, seed=5)
    n, steps = sampler["num_frame_per_block"], len(sampler["denoising_step_list"])
    tensors = {
        "noise": draw(f"{name} noise", batch, frames, 16, 10, 12),
        "renoise": draw(f"{name} renoise", frames // n, steps - 1, batch * n, 16, 10, 12),
        "prompt_embeds": draw(f"{name} prompt", batch, 5, 8),
    }
    ours = SamplerConfig(
        denoising_steps=tuple(sampler["denoising_step_list"]),
        warp=sampler.get("warp", True),
        shift=kwargs["timestep_shift"],
        context_timestep=sampler.get("context_noise", 0.0),
        frames_per_block=n,
    )
    method, settings = "base", {"window": kwargs["local_attn_size"], "sink": kwargs["sink_size"]}
    if kwargs.get("use_latentmem"):
        method = "rag"
        settings |= {"top_k": kwargs["memory_size"], "recent_exclude": kwargs["recent_exclude"]}
        settings |= {"descriptor": "avg_pool"}
    recording = record(
        transformer, ours, method, settings, tensors["prompt_embeds"], tensors["noise"], tensors["renoise"]
    )
    tensors["output"] = recording.latents
    case = {"frames": frames, "batch": batch, "model_weights": "weights.safetensors", "model_kwargs": kwargs, **sampler}
    content = {"case": case, "model": SIZES, "timesteps": recording.timesteps[:-1]}
    content["memory_indices_log"] = retrieval_log(recording, n)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    save_file(transformer.state_dict(), folder / "weights.safetensors")


def retrieval_log(recording: Recording, n: int) -> list[dict[str, Any]]:
    log = []
    for block, elements in enumerate(recording.trace):
        frames = [[row.frame for row in rows if row.kind == "retrieved"] for rows in elements]
        if any(frames):
            log.append({"query_frame": block * n, "selected_global_frames": frames})
    return log


RAG = {
    "use_latentmem": True,
    "memory_size": 2,
    "recent_exclude": 1,
    "timestep_shift": 3.0,
    "compression_method": "avg_pool",
}
OTHER_SIZES = {
    "all frames": Case(
        {"num_frame_per_block": 2, "denoising_step_list": [1000, 400]},
        {"local_attn_size": -1, "sink_size": 0, "timestep_shift": 8.0},
        1,
        8,
    ),
    "batch of two, no sink": Case(
        {"num_frame_per_block": 2, "denoising_step_list": [900, 500, 100], "warp": False, "context_noise": 20},
        {"local_attn_size": 6, "sink_size": 0, "timestep_shift": 3.0, **RAG},
        2,
        20,
    ),
    "one step": Case(
        {"num_frame_per_block": 1, "denoising_step_list": [1000]},
        {"local_attn_size": 5, "sink_size": 2, "timestep_shift": 3.0, **RAG},
        1,
        12,
    ),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_other_sizes_are_read_from_the_files(tmp_path: Path, name: str) -> None:
    make_case(tmp_path / "held_back", name, OTHER_SIZES[name])
    results = verify_path(tmp_path)
    assert not failed(results)
    assert {"output", "timesteps"} <= {row.tensor for row in results}
    if "use_latentmem" in OTHER_SIZES[name].kwargs:
        log = json.loads((tmp_path / "held_back" / f"{name}.json").read_text())["memory_indices_log"]
        assert log, "the case retrieves nothing and so tests nothing"


def test_a_wrong_element_of_a_batch_fails(tmp_path: Path) -> None:
    name = "batch of two, no sink"
    make_case(tmp_path, name, OTHER_SIZES[name])
    path = tmp_path / f"{name}.json"
    content = json.loads(path.read_text())
    content["memory_indices_log"][-1]["selected_global_frames"].reverse()
    path.write_text(json.dumps(content))
    assert [row.tensor for row in verify_path(tmp_path) if row.status == "fail"] == ["retrieved frames"]


def test_a_lost_half_is_a_failure(tmp_path: Path) -> None:
    make_case(tmp_path, "case", OTHER_SIZES["one step"])
    (tmp_path / "case.safetensors").unlink()
    (row,) = verify_path(tmp_path)
    assert (row.case, row.status) == ("case", "fail")
    assert "safetensors" in row.reason


@pytest.mark.parametrize("file", ["case.json", "case.safetensors"])
def test_a_file_that_cannot_be_read_is_a_failure(tmp_path: Path, file: str) -> None:
    make_case(tmp_path, "case", OTHER_SIZES["one step"])
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:100])
    results = verify_path(tmp_path)
    assert any(row.case == file and "cannot be read" in row.reason for row in results if row.status == "fail")


def test_missing_weights_are_a_failure_of_their_case_alone(tmp_path: Path) -> None:
    make_case(tmp_path / "good", "case", OTHER_SIZES["one step"])
    make_case(tmp_path / "poor", "case", OTHER_SIZES["one step"])
    (tmp_path / "poor" / "weights.safetensors").unlink()
    results = verify_path(tmp_path)
    assert {row.folder for row in results if row.status == "fail"} == {"poor"}
    assert any("weights.safetensors is not there" in row.reason for row in results)


def test_tensors_in_no_known_format_are_said_to_be_skipped(tmp_path: Path) -> None:
    make_case(tmp_path / "good", "case", OTHER_SIZES["one step"])
    (tmp_path / "strange").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "strange" / "x.safetensors")
    (row,) = [row for row in verify_path(tmp_path) if row.folder == "strange"]
    assert row.status == "skip"
    assert "no golden vectors" in row.reason


def test_a_path_without_golden_vectors_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is empty"):
        verify_path(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        verify_path(tmp_path / "absent")
    file = tmp_path / "notes.txt"
    file.write_text("nothing")
    with pytest.raises(UsageError, match="is a file"):
        verify_path(file)
    with pytest.raises(UsageError, match=r"it holds notes\.txt"):
        verify_path(tmp_path)

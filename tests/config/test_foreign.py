"""Inference YAMLs of the released code: every key that decides the videos arrives, and nothing is lost silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lrag_ray.cli import app as cli
from lrag_ray.config.foreign import import_config, is_foreign
from lrag_ray.config.horizons import latent_frames
from lrag_ray.config.load import complete, load_config
from lrag_ray.config.schema import RunConfig
from lrag_ray.config.source import parse_document
from lrag_ray.errors import ConfigError
from lrag_ray.wan.config import SamplerConfig, WanConfig
from tests.conftest import REPOSITORY

LONGLIVE_RAG: dict[str, Any] = {
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "num_frame_per_block": 3,
    "model_name": "Wan2.1-T2V-1.3B",
    "model_kwargs": {
        "local_attn_size": 12,
        "timestep_shift": 5.0,
        "sink_size": 1,
        "memory_size": 6,
        "recent_exclude": 5,
        "use_latentmem": True,
        "compression_method": "ae",
        "ae_ckpt": "checkpoints/ae_latent_mem.pt",
    },
    "generator_ckpt": "checkpoints/longlive_base.pt",
    "lora_ckpt": "checkpoints/longlive_lora.pt",
    "adapter": {"type": "lora", "rank": 256, "alpha": 128, "dropout": 0.0, "dtype": "bfloat16", "verbose": False},
    "data_path": "checkpoints/prompts.txt",
    "output_folder": "videos/longlive",
    "inference_iter": -1,
    "skip_existing": True,
    "num_output_frames": 120,
    "use_ema": True,
    "seed": 3,
    "num_samples": 2,
    "save_with_index": True,
    "global_sink": True,
    "context_noise": 0,
}
SELF_FORCING: dict[str, Any] = {
    "generator_ckpt": "checkpoints/ode_init.pt",
    "real_name": "Wan2.1-T2V-14B",
    "denoising_step_list": [1000, 500, 0],
    "timestep_shift": 5.0,
    "guidance_scale": 3.0,
    "wandb_key": "do-not-show",
    "lr": 2e-06,
    "seed": 0,
    "data_path": "prompts/vidprom.txt",
    "image_or_video_shape": [1, 21, 16, 44, 78],
    "distribution_loss": "dmd",
    "trainer": "score_distillation",
    "model_kwargs": {"timestep_shift": 4.0, "mla_attn_layers": "0,1"},
    "denoising_step_list_first_chunk": [1000, 750],
    "independent_first_frame": False,
}


def imported(data: dict[str, Any]) -> tuple[RunConfig, str]:
    text = import_config("released.yaml", data)
    return complete(parse_document("ours.yaml", text)), text


def test_a_file_of_longlive_rag_arrives_whole() -> None:
    config, text = imported(LONGLIVE_RAG)
    backbone = config.backbones["generator"]
    assert backbone.sampler == SamplerConfig((1000, 750, 500, 250), True, 5.0, 0.0, 3)
    assert backbone.transformer == WanConfig() and backbone.dtype == "bfloat16"
    weights = backbone.weights
    assert (weights.path, weights.use_ema) == ("checkpoints/longlive_base.pt", True)
    assert weights.lora is not None
    assert (weights.lora.path, weights.lora.rank, weights.lora.alpha) == ("checkpoints/longlive_lora.pt", 256, 128)
    assert config.methods["rag"].settings == {
        "window": 12,
        "sink": 1,
        "top_k": 6,
        "recent_exclude": 5,
        "descriptor": "ae",
        "encoder": "checkpoints/ae_latent_mem.pt",
    }
    assert (config.run.seed, config.prompts.path, config.prompts.samples) == (3, "checkpoints/prompts.txt", 2)
    assert config.prompts.limit is None
    assert [latent_frames(duration, 3) for duration in config.durations_s] == [120]
    assert backbone.vae.path == "wan_models/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"
    assert "# Without equivalent (run.uri is where results go): output_folder, save_with_index, skip_existing" in text


def test_a_training_file_of_self_forcing_says_what_is_not_carried_over() -> None:
    config, text = imported(SELF_FORCING)
    backbone = config.backbones["generator"]
    # Their defaults: one frame a block, steps as they are, 21 latent frames; the last step 0 is never sampled.
    assert backbone.sampler == SamplerConfig((1000, 500), False, 4.0, 0.0, 1, (1000, 750))
    assert (backbone.latent.height, backbone.latent.width) == (44, 78)
    assert config.durations_s == [21 / 4]
    assert config.methods["base"].settings == {"window": -1, "sink": 0}
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any("training begins from" in line and "ode_init.pt" in line for line in comments)
    assert "#   model_kwargs.mla_attn_layers: 0,1" in comments
    assert not any("independent_first_frame" in line for line in comments)
    training = next(line for line in comments if "training alone" in line)
    assert all(key in training for key in ("guidance_scale", "lr", "real_name", "trainer", "wandb_key"))
    assert "do-not-show" not in text


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"model_kwargs": {"local_attn_size": 9, "sink_size": 3}}, {"base": {"window": 9, "sink": 3}}),
        ({"model_kwargs": {}}, {"base": {"window": 21, "sink": 0}}),
        (
            {"model_kwargs": {"local_attn_size": 12, "use_infinite_attention": True}},
            {"infinity_rope": {"window": 12, "sink": 0}},
        ),
        (
            {"model_kwargs": {"local_attn_size": 12, "use_latentmem": True, "memory_size": 2}},
            {"rag": {"window": 12, "sink": 0, "top_k": 2, "recent_exclude": 0, "descriptor": "avg_pool"}},
        ),
    ],
)
def test_model_kwargs_name_the_method(change: dict[str, Any], settings: dict[str, Any]) -> None:
    config, _ = imported(LONGLIVE_RAG | change)
    assert {name: method.settings for name, method in config.methods.items()} == settings


def test_a_lora_without_a_strength_leaves_it_to_the_file() -> None:
    config, _ = imported(LONGLIVE_RAG | {"adapter": {"type": "lora"}})
    lora = config.backbones["generator"].weights.lora
    assert lora is not None and (lora.rank, lora.alpha) == (None, None)
    config, text = imported({key: value for key, value in LONGLIVE_RAG.items() if key != "adapter"})
    assert config.backbones["generator"].weights.lora is None and "their code does not load it" in text


def test_the_number_of_the_last_prompt_is_a_limit() -> None:
    assert imported(LONGLIVE_RAG | {"inference_iter": 0})[0].prompts.limit == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"model": "x"}, "not an inference configuration of Self-Forcing"),
        ({**LONGLIVE_RAG, "model_name": "Wan2.2-TI2V-5B"}, r"model_name Wan2\.2-TI2V-5B is not run here"),
        ({**LONGLIVE_RAG, "denoising_step_list": None}, "that of a many-step model"),
        ({**LONGLIVE_RAG, "num_output_frames": 100}, "100 is not a number of whole blocks of 3"),
        ({**LONGLIVE_RAG, "model_kwargs": "x" * 10_000}, r"model_kwargs is 'x{76}\.\.\., expected a section"),
        ({**LONGLIVE_RAG, "model_kwargs": 3}, "model_kwargs is 3, expected a section"),
        ({**LONGLIVE_RAG, "model_kwargs": {"timestep_shift": [5]}}, r"timestep_shift is \[5\], expected a number"),
        ({**LONGLIVE_RAG, "context_noise": 10**400}, "context_noise is 1000"),
        ({**LONGLIVE_RAG, "num_frame_per_block": 0}, "120 is not a number of whole blocks of 0"),
    ],
)
def test_what_cannot_be_imported_is_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"{said}(.|\n)*Fix: "):
        import_config("released.yaml", data)


@pytest.mark.parametrize("line_break", ["\n", "\r", "\x85", "\u2028"])
@pytest.mark.parametrize("key", ["lora_ckpt", None])
def test_nothing_of_a_strangers_file_leaves_the_comments(key: str | None, line_break: str) -> None:
    """A configuration may start commands and import modules."""
    hostile = f"x{line_break}watch: {{on_end: {{command: [touch, owned]}}}}{line_break}#"
    text = import_config("released.yaml", {**LONGLIVE_RAG, **({key: hostile} if key else {hostile: 1})})
    assert "watch:" in text and "watch" not in yaml.safe_load(text)


@pytest.mark.parametrize("data", [LONGLIVE_RAG, SELF_FORCING])
def test_a_run_with_such_a_file_says_so_in_one_line_and_its_advice_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("released.yaml").write_text(yaml.safe_dump(data))
    refused = CliRunner().invoke(cli.app, ["run", "released.yaml"])
    assert refused.exit_code == 2
    assert len(refused.output.strip().splitlines()) == 1
    assert "lrag-ray import-config released.yaml --to mine.yaml" in refused.output
    done = CliRunner().invoke(cli.app, ["import-config", "released.yaml", "--to", "mine.yaml"])
    assert done.exit_code == 0 and "Without equivalent" in done.output
    assert "generator" in load_config("mine.yaml").backbones
    assert CliRunner().invoke(cli.app, ["import-config", "released.yaml"]).output == Path("mine.yaml").read_text()
    again = CliRunner().invoke(cli.app, ["import-config", "released.yaml", "--to", "mine.yaml"])
    assert again.exit_code == 2 and "Fix: give another --to" in again.output


@pytest.mark.parametrize("name", ["demo", "table2", "ablation_budget"])
def test_our_own_files_are_not_taken_for_theirs(name: str) -> None:
    assert not is_foreign(yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text()))

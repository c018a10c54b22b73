from __future__ import annotations

import pytest

from lrag_ray.config.load import load_config
from lrag_ray.config.presets import CHECKPOINT_NOTES, PRESETS, overlay
from lrag_ray.config.prompts import plan_prompts
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.pipelines.plan import make_plan
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.weights.published import PUBLISHED
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("name", ["self_forcing", "causal_forcing", "causal_forcing_long", "longlive"])
def test_the_real_presets_are_wan_1_3b_as_the_paper_runs_it(name: str) -> None:
    backbone = BackboneConfig.model_validate(PRESETS[name])
    assert backbone.transformer == WanConfig()
    assert backbone.sampler == SamplerConfig()
    assert backbone.transformer.kv_bytes_per_frame(backbone.latent.height, backbone.latent.width, 2) == 287_539_200
    assert backbone.dtype == "bfloat16"
    assert backbone.weights.use_ema == (name in ("self_forcing", "causal_forcing_long"))
    assert (backbone.weights.lora is not None) == (name == "longlive")


def test_causal_forcing_is_the_papers_checkpoint_and_says_so() -> None:
    """The authors call the 5 s checkpoint an extremely unfair baseline for long video, and publish another."""
    of_paper, of_authors = (BackboneConfig.model_validate(PRESETS[f"causal_forcing{end}"]) for end in ("", "_long"))
    assert of_paper.weights.path == "weights/causal_forcing.pt" and "5 s checkpoint" in of_paper.label
    assert of_authors.weights.path == "weights/longvideo.pt" and "long-video" in of_authors.label
    assert "extremely unfair" in CHECKPOINT_NOTES["causal_forcing.pt"]
    published = PUBLISHED["longvideo.pt"]
    assert (published.repository, published.files[0].path) == ("zhuhz22/Causal-Forcing", "chunkwise/longvideo.pt")


def test_the_plan_says_where_a_checkpoint_is_sampled_as_it_was_not_trained() -> None:
    """longvideo.pt is trained for rolling windows, all others for the block loop."""
    assert "trained for rolling_forcing; others" in PRESETS["causal_forcing_long"]["label"]

    def notes(preset: str) -> list[str]:
        methods = "methods={base: {}, infinity_rope: {}, rolling_forcing: {}}"
        config = load_config(
            REPOSITORY / "configs" / "table2.yaml", [f"backbones={{model: {{preset: {preset}}}}}", methods]
        )
        found = make_plan(config, plan_prompts(config.prompts)).notes
        return [note for note in found if note.startswith("backbones.model: ") and "trained" in note]

    (long,) = notes("causal_forcing_long")
    assert "longvideo.pt is trained for rolling windows" in long
    assert "base, infinity_rope: sampled block by block" in long
    (ordinary,) = notes("self_forcing")
    assert "rolling_forcing: blocks of several noise levels" in ordinary and "self_forcing.pt" in ordinary
    assert notes("tiny") == []


@pytest.mark.parametrize(("name", "steps"), [("framewise", 4), ("2step", 2), ("1step", 1)])
def test_frame_wise_generators_denoise_the_first_frame_in_four_steps(name: str, steps: int) -> None:
    backbone = BackboneConfig.model_validate(PRESETS[f"causal_forcing_{name}"])
    sampler = backbone.sampler
    assert (sampler.frames_per_block, len(sampler.steps_of(0)), len(sampler.steps_of(1))) == (1, 4, steps)
    assert (sampler.first_block_denoising_steps is None) == (steps == 4), "equal steps are not stated twice"
    assert backbone.weights.use_ema
    file = str(backbone.weights.path).removeprefix("weights/")
    assert "5 s" in CHECKPOINT_NOTES[file]
    assert [hub_file.name for hub_file in PUBLISHED[file].files] == [file], "the name under which it is looked for"


@pytest.mark.parametrize("name", ["ablation_budget", "ablation_embedding"])
def test_the_ablations_are_those_of_table_3(name: str) -> None:
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    assert config.durations_s == [30]
    assert [backbone.preset for backbone in config.backbones.values()] == ["causal_forcing"]
    notes = make_plan(config, plan_prompts(config.prompts)).notes
    assert any(note.startswith("backbones.causal_forcing: causal_forcing.pt is") for note in notes)


def test_the_tiny_preset_needs_no_file() -> None:
    backbone = BackboneConfig.model_validate(PRESETS["tiny"])
    assert backbone.label == "tiny, untrained"
    assert backbone.weights.path is None
    assert (backbone.text_encoder.kind, backbone.vae.kind) == ("tiny", "tiny")


def test_given_keys_lie_over_the_preset_at_any_depth() -> None:
    preset = {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": [1, 2]}
    assert overlay(preset, {"a": {"c": {"e": 4}}, "f": [3], "g": 5}) == {
        "a": {"b": 1, "c": {"d": 2, "e": 4}},
        "f": [3],
        "g": 5,
    }
    assert preset == {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": [1, 2]}


def test_random_weights_replace_a_checkpoint_and_what_belongs_to_it() -> None:
    merged = overlay(PRESETS["longlive"], {"weights": {"random_seed": 3}})
    assert merged["weights"] == {"random_seed": 3}


def test_a_checkpoint_replaces_random_weights_and_keeps_its_lora() -> None:
    assert overlay(PRESETS["tiny"], {"weights": {"path": "mine.pt"}})["weights"] == {"path": "mine.pt"}
    weights = overlay(PRESETS["longlive"], {"weights": {"path": "mine.pt"}})["weights"]
    assert weights["path"] == "mine.pt" and weights["lora"]["rank"] == 256


def test_another_kind_keeps_nothing_of_the_presets_kind() -> None:
    merged = overlay(PRESETS["self_forcing"], {"vae": {"kind": "tiny"}, "text_encoder": {"kind": "umt5", "path": "x"}})
    assert merged["vae"] == {"kind": "tiny"}
    assert merged["text_encoder"]["tokenizer"] == PRESETS["self_forcing"]["text_encoder"]["tokenizer"]

from __future__ import annotations

import pytest

from lrag_ray.config.presets import PRESETS, overlay
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.wan.config import SamplerConfig, WanConfig


@pytest.mark.parametrize("name", ["self_forcing", "causal_forcing", "longlive"])
def test_the_real_presets_are_wan_1_3b_as_the_paper_runs_it(name: str) -> None:
    backbone = BackboneConfig.model_validate(PRESETS[name])
    assert backbone.transformer == WanConfig()
    assert backbone.sampler == SamplerConfig()
    assert backbone.transformer.kv_bytes_per_frame(backbone.latent.height, backbone.latent.width, 2) == 287_539_200
    assert backbone.dtype == "bfloat16"
    assert backbone.weights.use_ema == (name == "self_forcing")
    assert (backbone.weights.lora is not None) == (name == "longlive")


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

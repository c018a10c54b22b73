"""Weights of the world that come with the package: the documented files, read as real ones are, and what they do."""

from __future__ import annotations

import hashlib
from typing import get_args

import pytest
import torch

from lrag_ray.config.load import complete
from lrag_ray.config.presets import PRESETS
from lrag_ray.config.schema import BackboneConfig, WeightsConfig
from lrag_ray.config.source import Document
from lrag_ray.pipelines.speeds import VAE_SIZES
from lrag_ray.stages.backbone import latents_identity, load_generator, load_text, load_vae, pixels_identity
from lrag_ray.wan.kernels import Kernels
from lrag_ray.wan.vae import video_frames
from lrag_ray.world import builtin, generator, vae
from lrag_ray.world.code import fit_code
from lrag_ray.world.scenes import HELD_OUT, make_scene

CPU = torch.device("cpu")


def preset(name: str, **weights: object) -> BackboneConfig:
    """A preset, with keys of its weights that are given."""
    data = {
        "run": {"uri": "x"},
        "prompts": {"count": 1},
        "durations_s": [24],
        "backbones": {"w": {"preset": name, **({"weights": weights} if weights else {})}},
        "methods": {"base": {}},
    }
    return complete(Document("run.yaml", data)).backbones["w"]


def test_the_files_are_those_that_are_documented() -> None:
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in builtin.DIGESTS} == builtin.DIGESTS
    files = {path for path in builtin.VAE.parent.rglob("*") if path.is_file()}
    assert files == {*builtin.DIGESTS, builtin.VAE / "config.json"}
    assert sum(path.stat().st_size for path in files) < 12e6


def test_presets_name_what_was_trained() -> None:
    names = [name for part in get_args(WeightsConfig.model_fields["builtin"].annotation) for name in get_args(part)]
    assert names == list(builtin.GENERATORS)
    for name in names:
        backbone = preset(name)
        assert backbone.weights.builtin == name
        assert (backbone.transformer, backbone.sampler) == (generator.SIZES, generator.SAMPLER)
        assert (backbone.latent.channels, backbone.latent.height, backbone.latent.width) == generator.LATENT_SHAPE
    sizes = VAE_SIZES["tiny_world"]
    assert (sizes.base_dim, list(sizes.dim_mult)) == (vae.SIZES["base_dim"], vae.SIZES["dim_mult"])
    assert list(sizes.temporal_upsample) == vae.SIZES["temperal_downsample"][::-1]
    assert (sizes.num_res_blocks, sizes.spatial_compression) == (vae.SIZES["num_res_blocks"], 16)


def test_a_preset_gives_videos_of_the_world() -> None:
    backbone = preset("tiny_world")
    model = load_generator(backbone, CPU, Kernels())
    assert sum(parameter.numel() for parameter in model.parameters()) == backbone.transformer.parameter_count()
    assert load_text(backbone, CPU).encode([HELD_OUT[0].prompt])[0].shape[-1] == backbone.transformer.text_dim
    scene = make_scene("builtin", 0, among=HELD_OUT)
    pixels = load_vae(backbone, CPU).decode(fit_code(0).of_scene(scene, range(3)))
    assert pixels.shape == (video_frames(3), 3, 128, 128)
    truth = torch.from_numpy(scene.video(3)).permute(0, 3, 1, 2) / 127.5 - 1
    assert float(vae.psnr((pixels - truth).square().mean())) > 26


def test_the_vae_passes_its_gate_on_scenes_that_no_training_saw() -> None:
    assert vae.held_out_psnr(builtin.load_vae(), fit_code(0), scenes=4, latent_frames=6) > 28


def test_weights_are_part_of_what_a_rollout_and_a_video_are() -> None:
    trained, zero_shot, untrained = (preset(name) for name in (*builtin.GENERATORS, "tiny"))
    digests = [latents_identity(each)["weights"]["sha256"] for each in (trained, zero_shot)]
    assert digests == [builtin.DIGESTS[file] for file in builtin.GENERATORS.values()]
    assert latents_identity(untrained)["weights"]["sha256"] is None
    found = pixels_identity(trained)["vae"]
    assert (found["kind"], len(found["sha256"])) == ("tiny_world", 64)


@pytest.mark.parametrize(
    ("given", "source"), [({"random_seed": 3}, "random_seed"), ({"path": "mine.pt"}, "path"), ({}, "builtin")]
)
def test_other_weights_take_the_place_of_those_of_the_preset(given: dict[str, object], source: str) -> None:
    backbone = preset("tiny_world", **given)
    weights = backbone.weights
    assert [name for name in ("path", "random_seed", "builtin") if getattr(weights, name) is not None] == [source]
    assert (backbone.label == PRESETS["tiny_world"]["label"]) == (source == "builtin")

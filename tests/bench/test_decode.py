"""`bench decode`: every variant of the decoder beside float32."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from lrag_ray.bench import decode
from lrag_ray.bench.decode import Variant
from lrag_ray.bench.rollout import random_backbone
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.config.vae import VaeConfig
from lrag_ray.pipelines.decode import _weights_of
from lrag_ray.scoring.vbench_long.clips import ClipSpan
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.scoring.vbench_long.score import ClipScorer
from lrag_ray.stages.backbone import load_vae, pixels_identity
from lrag_ray.video.decode import StreamingDecoder
from tests.bench.test_rollout import program

CPU = torch.device("cpu")


def with_vae(**vae: object) -> BackboneConfig:
    backbone = random_backbone("tiny")
    return backbone.model_copy(update={"vae": backbone.vae.model_copy(update=vae)})


def test_each_variant_is_compared_with_float32() -> None:
    done = CliRunner().invoke(program(), ["bench", "decode", "--seconds", "0.25", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    plain, last, fused, bfloat16, _, _, float16, _, _ = json.loads(done.stdout)["variants"]
    assert (plain["dtype"], plain["channels_last"], plain["psnr_db"]) == ("float32", False, None)
    assert last["channels_last"] and (last["psnr_db"] is None or last["psnr_db"] > 60)
    assert fused["fused_norm"] and fused["failed"] == "it runs on GPUs alone"
    assert 20 < bfloat16["psnr_db"] < float16["psnr_db"]
    assert bfloat16["psnr_worst_db"] <= bfloat16["psnr_db"]
    assert plain["vbench"] is None and all(each["fps"] > 0 for each in (plain, last, bfloat16, float16))


def test_dimensions_are_scored_beside_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the dimension with the smallest network, the difference is that of the means over the clips."""
    monkeypatch.setattr(decode, "DIMENSION_NAMES", ["motion_smoothness"])
    monkeypatch.setattr(decode, "VARIANTS", [Variant("float32", False), Variant("bfloat16", False)])
    networks = Networks(RandomWeights(), "cpu")
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    plain, bfloat16 = decode.bench_decode(random_backbone("tiny"), [latents], CPU, fps=2, networks=networks)
    assert plain.vbench == {"motion_smoothness": 0}
    means = []
    for dtype in ("float32", "bfloat16"):
        frames = StreamingDecoder(load_vae(with_vae(dtype=dtype), CPU)).push(latents)
        clips = [list(frames[:4]), list(frames[1:5])]
        scores = [next(ClipScorer("", networks, 2).clip(ClipSpan(0, 4), clip, ["motion_smoothness"])) for clip in clips]
        means.append(sum(row.score for row in scores if row.score is not None) / 2)
    assert bfloat16.vbench is not None
    assert bfloat16.vbench["motion_smoothness"] == pytest.approx(means[1] - means[0], rel=1e-4) != 0


def test_weights_are_laid_out_with_channels_side_by_side() -> None:
    """cuDNN takes the layout of the weights for all that follows; the CPU's small convolutions ignore it."""
    vae = load_vae(with_vae(channels_last=True), CPU)
    convolutions = [m for m in vae.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)]
    for module in convolutions:
        last = torch.channels_last if module.weight.dim() == 4 else torch.channels_last_3d
        assert module.weight.is_contiguous(memory_format=last)
    assert len(convolutions) > 20


def test_videos_of_other_layouts_are_others_and_those_without_a_choice_stay_the_same() -> None:
    plain, last = (pixels_identity(with_vae(channels_last=on))["vae"] for on in (False, True))
    fused = pixels_identity(with_vae(channels_last=True, fused_norm=True))["vae"]
    assert plain == {"kind": "tiny", "sha256": None, "dtype": "float32"}
    assert last == plain | {"channels_last": True}
    assert fused == last | {"fused_norm": True}
    assert _weights_of({"vae": fused}) == _weights_of({"vae": plain}), "it is the same VAE"


def test_a_fused_norm_needs_the_layout_that_it_reads() -> None:
    with pytest.raises(ValidationError, match=r"fused_norm .* Fix: set channels_last: true too"):
        VaeConfig(kind="tiny", fused_norm=True)


def test_float16_that_overflows_is_an_error_with_the_way_out() -> None:
    vae = load_vae(with_vae(dtype="float16"), CPU)
    vae.model.decoder.conv_in.weight.data.fill_(6e4)
    with pytest.raises(OverflowError, match=r"Fix: vae\.dtype: bfloat16 or float32"):
        StreamingDecoder(vae).push(torch.ones(1, 16, 2, 2))

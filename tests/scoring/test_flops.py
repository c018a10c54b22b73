"""Closed forms held against what torch counts on networks without values (or with random ones)."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lrag_ray.scoring.flops import (
    amt_flops,
    clip_flops,
    clip_to_clip_flops,
    musiq_flops,
    raft_flops,
    vbench_flops,
    vit_flops,
)
from lrag_ray.scoring.vbench_long import networks as vbench
from lrag_ray.scoring.vbench_long.amt import FrameInterpolator
from lrag_ray.scoring.vbench_long.imaging_quality import shrink
from lrag_ray.scoring.vbench_long.musiq import ImageRater
from lrag_ray.scoring.vbench_long.raft import FlowEstimator
from lrag_ray.scoring.vbench_long.vit import VisionTransformer, VitConfig


def counted(run: Callable[[], object]) -> int:
    # torch counts attention as matrix products, not the fused kernels.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run()
    return int(counter.get_total_flops())


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [(vbench.DINO, 224, 388), (vbench.CLIP_B32, 224, 224), (vbench.CLIP_L14, 224, 224), (vbench.DINOV2, 224, 224)],
    ids=["DINO", "CLIP B/32", "CLIP L/14", "DINOv2"],
)
def test_vision_transformers(config: VitConfig, height: int, width: int) -> None:
    with torch.device("meta"):
        model = VisionTransformer(config).eval()
        assert counted(lambda: model(empty(1, 3, height, width))) == vit_flops(config, height, width)


def test_first_frames_of_clips() -> None:
    with torch.device("meta"):
        dinov2, dreamsim = VisionTransformer(vbench.DINOV2).eval(), vbench.DreamSim().eval()
        frame = empty(1, 3, 224, 224)
        assert counted(lambda: dinov2(frame)) + counted(lambda: dreamsim(frame)) == clip_to_clip_flops()


@pytest.mark.parametrize(("height", "width"), [(480, 832), (128, 192)])
def test_flow_and_interpolation(height: int, width: int) -> None:
    raft = vbench.public_network("vbench.third_party.RAFT.core.raft", "RAFT")
    amt_model = vbench.public_network("vbench.third_party.amt.networks.AMT-S", "Model")
    with torch.device("meta"):
        options = argparse.Namespace(small=False, mixed_precision=False, alternate_corr=False)
        flow = FlowEstimator(raft(options).eval())
        amt = FrameInterpolator(amt_model(corr_radius=3, corr_lvls=4, num_flows=3).eval())
        frames = empty(3, 3, height, width)
        assert counted(lambda: list(flow.flows(frames, 2))) == raft_flops(2, height, width)
        assert counted(lambda: amt.middle(frames[:1], frames[1:2])) == amt_flops(height, width)


@pytest.mark.parametrize(("height", "width"), [(480, 832), (128, 192), (528, 176)])
def test_musiq(height: int, width: int) -> None:
    musiq = vbench.public_network("pyiqa.archs.musiq_arch", "MUSIQ")(pretrained=False, num_class=1).eval()
    image = shrink(torch.rand(1, 3, height, width) * 255)
    assert counted(lambda: ImageRater(musiq).rate(image)) == musiq_flops(height, width)


def test_a_clip_and_a_video() -> None:
    """A 30 s video has 15 clips; its 60 s continuation adds 15 and shares all but the overlapping last one."""
    clip, slow = clip_flops(32, 16, 480, 832), clip_to_clip_flops()
    assert clip / 1e12 == pytest.approx(19.7, abs=0.05)
    assert vbench_flops([477], 16, 480, 832) == 15 * (clip + slow)
    assert vbench_flops([477, 957], 16, 480, 832) == 31 * clip + (15 + 30) * slow
    assert vbench_flops([32], 16, 480, 832) == clip
    assert vbench_flops([8], 16, 480, 832) < clip

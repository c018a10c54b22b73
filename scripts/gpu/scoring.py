"""The networks of VBench-Long, batch by batch: milliseconds per frame or frame pair, and peak memory."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrag_ray.scoring.vbench_long import networks
from lrag_ray.scoring.vbench_long.amt import FLOWS, FrameInterpolator
from lrag_ray.scoring.vbench_long.amt import RADIUS as AMT_RADIUS
from lrag_ray.scoring.vbench_long.correlation import LEVELS, pairs_at_once
from lrag_ray.scoring.vbench_long.imaging_quality import shrink
from lrag_ray.scoring.vbench_long.musiq import ImageRater
from lrag_ray.scoring.vbench_long.networks import Networks, public_network
from lrag_ray.scoring.vbench_long.preprocess import SIDE
from lrag_ray.scoring.vbench_long.raft import FlowEstimator
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.scoring.vbench_long.vit import VisionTransformer, VitConfig
from scripts.gpu.harness import GIGA, SIZES, Bench

VITS: Mapping[str, VitConfig] = {
    "DINO": networks.DINO,
    "DINOv2": networks.DINOV2,
    "CLIP B/32": networks.CLIP_B32,
    "CLIP L/14": networks.CLIP_L14,
}


def scoring(bench: Bench) -> None:
    """One part per network, at 832x480; random weights, in the precision that `scoring.precision: official` takes."""
    full = bench.size is SIZES["full"]
    height, width = (480, 832) if full else (128, 128)
    frame_batches, pair_batches = ((1, 8, 32), range(1, 11)) if full else ((2,), (2,))
    for name, config in VITS.items():
        # DINO sees the whole frame, the others its centre.
        shape = (SIDE, SIDE * width // height) if name == "DINO" else (SIDE, SIDE)
        vit = config if full else replace(config, width=24, depth=1, heads=2, projection=min(config.projection, 8))
        run = _vit(bench, vit, shape, half=name.startswith("CLIP"))
        bench.part(f"scoring {name}", lambda run=run: _batches(bench, run(), frame_batches, "frame"))  # type: ignore[misc]
    rated = _musiq(bench, height, width)
    bench.part("scoring MUSIQ", lambda: _public(bench, "pyiqa", rated, frame_batches, "frame"))
    at_once = sorted({pairs_at_once(batch, height, width) for batch in pair_batches})
    for name, make in (("RAFT", _raft), ("AMT-S", _amt)):
        pairs = make(bench, height, width)
        bench.part(f"scoring {name}", lambda pairs=pairs: _public(bench, "vbench", pairs, at_once, "pair"))  # type: ignore[misc]


def _public(bench: Bench, package: str, make: Make, batches: Any, unit: str) -> dict[str, Any] | str:
    if importlib.util.find_spec(package) is None:
        return f"skipped: the network is part of {package}, which is not installed"
    return _batches(bench, make(), batches, unit)


Run = Callable[[int], object]
Make = Callable[[], Run]
"""From nothing to what takes a batch of this size through a network that is ready."""


def _batches(bench: Bench, run: Run, batches: Any, unit: str) -> dict[str, dict[str, float]]:
    found = {}
    policy = Networks(RandomWeights(), bench.device)
    for batch in batches:
        if bench.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
        with policy.numerics():
            seconds = bench.seconds(lambda batch=batch: run(batch), 5)  # type: ignore[misc]
        found[f"{batch} at once"] = {f"ms per {unit}": 1e3 * seconds / batch}
        if bench.cuda:
            found[f"{batch} at once"]["peak_gb"] = torch.cuda.max_memory_allocated(bench.device) / GIGA
    return found


def _vit(bench: Bench, config: VitConfig, shape: tuple[int, int], *, half: bool) -> Make:
    def make() -> Run:
        network = bench.filled(VisionTransformer, config).float()

        def run(batch: int) -> Tensor:
            images = bench.draw(batch, 3, *shape, dtype=torch.float32)
            with torch.autocast(bench.device.type, torch.float16, enabled=half and bench.cuda):
                found: Tensor = network(images)
            return found

        return run

    return make


def _random(bench: Bench, network: Callable[[], nn.Module]) -> nn.Module:
    """A network of a public package with random weights; those of its norms are the identity."""
    made: nn.Module = bench.filled(lambda _: network(), None).float()
    for name, buffer in made.named_buffers():
        buffer.fill_(name.endswith("running_var"))
    return made


def _raft(bench: Bench, height: int, width: int) -> Make:
    def make() -> Run:
        raft = public_network("vbench.third_party.RAFT.core.raft", "RAFT")
        options = argparse.Namespace(small=False, mixed_precision=False, alternate_corr=False)
        estimator = FlowEstimator(_random(bench, lambda: raft(options)))

        def run(batch: int) -> object:
            frames = 255 * torch.rand(batch + 1, 3, height, width, device=bench.device)
            return next(estimator.flows(frames, batch))

        return run

    return make


def _amt(bench: Bench, height: int, width: int) -> Make:
    def make() -> Run:
        amt = public_network("vbench.third_party.amt.networks.AMT-S", "Model")
        network = _random(bench, lambda: amt(corr_radius=AMT_RADIUS, corr_lvls=LEVELS, num_flows=FLOWS))
        interpolator = FrameInterpolator(network)
        return lambda batch: interpolator.middle(*torch.rand(2, batch, 3, height, width, device=bench.device))

    return make


def _musiq(bench: Bench, height: int, width: int) -> Make:
    def make() -> Run:
        musiq = public_network("pyiqa.archs.musiq_arch", "MUSIQ")
        rater = ImageRater(_random(bench, lambda: musiq(pretrained=False, num_class=1)))
        return lambda batch: rater.rate(shrink(255 * torch.rand(batch, 3, height, width, device=bench.device)))

    return make

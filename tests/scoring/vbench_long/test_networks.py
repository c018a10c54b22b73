"""One golden clip per network; `lrag-ray verify` runs them all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lrag_ray.bench import official_loops
from lrag_ray.errors import RunEnvironmentError
from lrag_ray.scoring.vbench_long import (
    aesthetic_quality,
    background_consistency,
    dynamic_degree,
    imaging_quality,
    motion_smoothness,
    subject_consistency,
)
from lrag_ray.scoring.vbench_long import networks as networks_module
from lrag_ray.scoring.vbench_long.consistency import consistency
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.networks import BatchSizes, Networks, public_network
from lrag_ray.scoring.vbench_long.official import NETWORKS, NetworkName
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.scoring.vbench_long.weights import Weights

CLIP = "shapes_000"


@pytest.fixture(scope="module")
def frames(vbench: Path) -> ClipFrames:
    path = vbench / "clips" / f"{CLIP}.mp4"
    return ClipFrames(list(decode(path)), int(probe(path).fps), torch.device("cpu"))


@pytest.fixture(scope="module")
def official(vbench: Path) -> dict[str, Any]:
    dimensions: dict[str, Any] = json.loads((vbench / "golden.json").read_text(encoding="utf-8"))["dimensions"]
    return dimensions


@pytest.fixture(scope="module")
def per_frame(vbench: Path) -> dict[str, Any]:
    lists: dict[str, Any] = json.loads((vbench / "per_frame.json").read_text(encoding="utf-8"))
    return lists


def first(frames: ClipFrames, count: int) -> ClipFrames:
    """The clip cut short, where the whole of it would take long on a CPU."""
    few = [frame.permute(1, 2, 0).numpy() for frame in frames.uint8[:count]]
    return ClipFrames(few, frames.fps, torch.device("cpu"))


def _golden_features(vbench: Path, name: str) -> Tensor:
    with safe_open(vbench / "features.safetensors", framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


class _Recorder(RandomWeights):
    """Notes names and shapes, and draws only what is small."""

    def __init__(self) -> None:
        self.small: dict[str, dict[str, Tensor]] = {}
        self.shapes: dict[str, dict[str, list[int]]] = {}

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        self.shapes[name] = {key: list(value.shape) for key, value in expected.items()}
        small = {key: value for key, value in expected.items() if value.numel() < 100_000}
        self.small[name] = dict(super().read(name, small).tensors)
        zeros = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in expected.items()}
        return Weights(zeros, "nothing")


def test_names_shapes_and_recipe_are_those_of_the_official_networks(
    vbench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks_module, "state_dict_digest", lambda tensors: "")  # gigabytes of zeros
    checks = json.loads((vbench / "weights_check.json").read_text(encoding="utf-8"))
    recorder = _Recorder()
    built = Networks(recorder)
    for network in ("dinov2", "clip_b32", "clip_l14", "aesthetic_head", "raft", "amt", "musiq", "dreamsim"):
        getattr(built, network)
    assert set(recorder.shapes) == set(checks) == set(NETWORKS)
    for name, shapes in recorder.shapes.items():
        assert shapes == {key: check["shape"] for key, check in checks[name].items()}
        drawn = {k: t for k, t in recorder.small[name].items() if t.is_floating_point()}
        assert drawn
        for key, tensor in drawn.items():
            assert f"{zlib.crc32(tensor.numpy().tobytes()):08x}" == checks[name][key]["crc32"], f"{name} {key}"


def test_subject_consistency(frames: ClipFrames, networks: Networks, official: dict[str, Any], vbench: Path) -> None:
    golden, seen = _golden_features(vbench, f"dino_vitb16/{CLIP}"), []
    hook = networks.dino.register_forward_hook(lambda module, images, features: seen.append(features))
    with networks.numerics():
        measured = subject_consistency.score(first(frames, 2), networks)
    hook.remove()
    torch.testing.assert_close(torch.cat(seen), golden[:2], atol=1e-4, rtol=0)
    values = consistency(golden)
    assert measured.per_frame == pytest.approx(values[:1], abs=1e-5)
    assert sum(values) / len(values) == pytest.approx(
        official["subject_consistency"]["per_clip"][CLIP]["inclip"], abs=1e-6
    )


def test_background_consistency(frames: ClipFrames, networks: Networks, official: dict[str, Any]) -> None:
    with networks.numerics():
        measured = background_consistency.score(frames, networks)
    golden = official["background_consistency"]["per_clip"][CLIP]["inclip"]
    assert measured.score == pytest.approx(golden, abs=1e-5)


@pytest.mark.parametrize("dimension", ["subject_consistency", "background_consistency"])
def test_clip_to_clip(dimension: str, networks: Networks, official: dict[str, Any], vbench: Path) -> None:
    module: Any = {"s": subject_consistency, "b": background_consistency}[dimension[0]]
    path = vbench / f"firstframes_{dimension.removesuffix('_consistency')}" / "shapes.mp4"
    first = ClipFrames(list(decode(path)), 6, torch.device("cpu"))
    with networks.numerics():
        values = consistency(module.slow_features(first.uint8, networks))
    golden = official[dimension]["clip2clip_per_video"]["shapes"]
    assert sum(values) / len(values) == pytest.approx(golden, abs=1e-5)
    if dimension == "subject_consistency":
        # The other side of the benchmark does the same sum.
        loop = official_loops.score_first_frames("subject_consistency", list(decode(path)), 6, networks)
        assert loop == pytest.approx(golden, abs=1e-5)


def test_motion_smoothness(
    frames: ClipFrames, networks: Networks, official: dict[str, Any], per_frame: dict[str, Any]
) -> None:
    with networks.numerics():
        measured = motion_smoothness.score(frames, networks)
    golden = official["motion_smoothness"]["per_clip"][CLIP]["score"]
    assert measured.score == pytest.approx(golden, abs=1e-5)
    assert measured.per_frame == pytest.approx(per_frame["motion_smoothness"][CLIP], abs=1e-2)


def test_predicted_frames_do_not_depend_on_the_batch_size(frames: ClipFrames, networks: Networks) -> None:
    few, found, before = first(frames, 7), [], networks.batch
    try:
        for networks.batch in (BatchSizes(1, 1), BatchSizes(1, 2)):
            with networks.numerics():
                found.append(motion_smoothness.middle_frames(few, networks).int())
    finally:
        networks.batch = before
    single, batched = found
    assert len(single) == 3
    # A value on the edge of two grey levels may fall to either side.
    assert (single - batched).abs().double().mean() < 1e-3


def test_dynamic_degree_stops_once_its_decision_is_certain(
    frames: ClipFrames, networks: Networks, official: dict[str, Any], per_frame: dict[str, Any]
) -> None:
    golden = official["dynamic_degree"]["per_clip"][CLIP]
    assert dynamic_degree.threshold(*frames.uint8.shape[2:]) == golden["threshold"]
    assert dynamic_degree.pairs_needed(len(frames)) == golden["count_needed"]
    with networks.numerics():
        measured = dynamic_degree.score(frames, networks)
    assert bool(measured.score) is golden["score"]
    assert 0 < len(measured.per_frame) < golden["pairs"]
    expected = per_frame["dynamic_degree"][CLIP][: len(measured.per_frame)]
    assert measured.per_frame == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("fps", "interval"), [(4, 1), (8, 1), (12, 2), (16, 2), (20, 2), (24, 3)])
def test_the_sampling_interval_rounds_halves_to_even(fps: int, interval: int) -> None:
    assert dynamic_degree.sampling_interval(fps) == interval


def test_aesthetic_quality(frames: ClipFrames, networks: Networks, per_frame: dict[str, Any]) -> None:
    with networks.numerics():
        measured = aesthetic_quality.score(first(frames, 2), networks)
    assert measured.per_frame == pytest.approx(per_frame["aesthetic_quality"][CLIP][:2], abs=1e-4)
    assert measured.score == pytest.approx(sum(per_frame["aesthetic_quality"][CLIP][:2]) / 20, abs=1e-5)


def test_imaging_quality(frames: ClipFrames, networks: Networks, per_frame: dict[str, Any]) -> None:
    with networks.numerics():
        measured = imaging_quality.score(first(frames, 4), networks)
    golden = per_frame["imaging_quality"][CLIP][:4]
    assert measured.per_frame == pytest.approx(golden, abs=1e-3)
    assert measured.score == pytest.approx(sum(golden) / 4, abs=1e-3)


def test_scores_do_not_depend_on_the_batch_size(frames: ClipFrames, networks: Networks) -> None:
    """Given three frames, batches of two leave a rest; the other tests hold whole batches against the golden scores."""
    measures: dict[str, tuple[Any, int, float]] = {
        "imaging_quality": (imaging_quality.score, 3, 1e-3),
        "background_consistency": (background_consistency.score, 3, 1e-5),
        "dynamic_degree": (partial(dynamic_degree.score, early_stop=False), 4, 0.0),
    }
    found: list[dict[str, Any]] = []
    before = networks.batch
    try:
        for networks.batch in (BatchSizes(1, 1), BatchSizes(2, 2)):
            with networks.numerics():
                found.append({name: measure(first(frames, n), networks) for name, (measure, n, _) in measures.items()})
    finally:
        networks.batch = before
    single, batched = found
    for name, (_, _, tolerance) in measures.items():
        assert single[name].score == pytest.approx(batched[name].score, abs=tolerance)
        assert single[name].per_frame == pytest.approx(batched[name].per_frame, abs=1e-3)


def test_a_missing_package_is_an_error_of_the_environment() -> None:
    with pytest.raises(RunEnvironmentError, match="no_such_package cannot be imported"):
        public_network("no_such_package", "Network")

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from lrag_ray.bench.scoring import bench_scoring, make_clip
from lrag_ray.cli import bench as cli
from lrag_ray.errors import UsageError
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.names import DimensionName
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.video.mp4 import Mp4Writer


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of a moving texture."""
    texture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = tmp_path_factory.mktemp("bench") / "moving.mp4"
    with Mp4Writer(path, fps=2) as writer:
        writer.write(np.stack([texture[:128, 3 * i : 3 * i + 128] for i in range(6)]))
    return path


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks(RandomWeights())


def test_the_official_flow_beside_ours_gives_the_same_scores(video: Path, networks: Networks) -> None:
    dimensions: list[DimensionName] = ["motion_smoothness"]
    bench = bench_scoring([video], networks, dimensions=dimensions, official=True)

    assert (bench.videos, bench.clips, bench.frames_per_clip, bench.width, bench.height) == (1, 2, 4, 128, 128)
    assert bench.largest_difference["motion_smoothness"] < 1e-5
    assert bench.clips_per_s["motion_smoothness"] == pytest.approx(2 / bench.ours.seconds["motion_smoothness"].wall)
    assert bench.official is not None
    assert bench.speedup == pytest.approx(bench.official.total.wall / bench.ours.total.wall)
    assert 0 < bench.decode_share < 1
    assert bench.clips_per_s_total == pytest.approx(2 / bench.ours.total.wall)
    whole, networks_alone = (
        ratios["motion_smoothness"].wall for ratios in (bench.speedup_per_dimension, bench.speedup_of_networks)
    )
    # The clip files that the official code decodes once more are what makes the difference.
    files = bench.official.files["motion_smoothness"].wall
    assert files > 0
    assert whole - networks_alone == pytest.approx(files / bench.ours.seconds["motion_smoothness"].wall)
    shown = json.loads(json.dumps(bench.as_dict()))
    assert shown["batch"] == {"frames": 8, "pairs": 1}
    for side in ("ours", "official"):
        parts = [*shown[side]["seconds"].values(), shown[side]["frames"]]
        assert shown[side]["total"]["cpu"] == pytest.approx(sum(part["cpu"] for part in parts))


def test_clips_without_a_score_are_refused(tmp_path: Path, networks: Networks) -> None:
    path = tmp_path / "small.mp4"
    with Mp4Writer(path, fps=4) as writer:
        writer.write(np.zeros((8, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="too small for AMT-S"):
        bench_scoring([path], networks, dimensions=["motion_smoothness"])
    with pytest.raises(UsageError, match="no video to score"):
        bench_scoring([], networks)


def test_the_made_clip_is_one_clip(tmp_path: Path) -> None:
    make_clip(tmp_path / "made.mp4", width=64, height=48)
    rate = probe(tmp_path / "made.mp4")
    assert (rate.width, rate.height, rate.fps) == (64, 48, 16.0)
    assert len(list(decode(tmp_path / "made.mp4"))) == 32


def test_command(video: Path) -> None:
    app = typer.Typer()
    cli.register(app)
    common = ["bench", "scoring", "--weights", "random", "--device", "cpu", "--video", str(video)]
    shown = CliRunner().invoke(app, [*common, "--dimensions", "motion_smoothness"])
    assert shown.exit_code == 0
    assert list(json.loads(shown.stdout)["clips_per_s"]) == ["motion_smoothness"]
    refused = CliRunner().invoke(app, [*common, "--dimensions", "motion"])
    assert refused.exit_code == 2 and "no dimension is called motion" in refused.stderr

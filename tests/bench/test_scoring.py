from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lrag_ray.bench.scoring import bench_scoring
from lrag_ray.scoring.vbench_long import Networks, RandomWeights
from lrag_ray.video.mp4 import Mp4Writer


def test_the_official_loop_beside_ours_gives_the_same_scores(tmp_path: Path) -> None:
    texture = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = tmp_path / "moving.mp4"
    with Mp4Writer(path, fps=4) as writer:
        writer.write(np.stack([texture[:64, 3 * i : 3 * i + 64] for i in range(12)]))

    bench = bench_scoring([path], Networks(RandomWeights()), dimensions=["motion_smoothness"], official=True)

    assert (bench.clips, bench.frames_per_clip, bench.width, bench.height) == (2, 8, 64, 64)
    assert bench.largest_difference["motion_smoothness"] < 1e-5
    assert bench.clips_per_s["motion_smoothness"] == pytest.approx(2 / bench.seconds["motion_smoothness"])
    assert bench.speedup == pytest.approx(sum(bench.official_seconds.values()) / bench.total_s)
    assert 0 < bench.decode_share < 1
    assert json.loads(json.dumps(bench.as_dict()))["batch"] == {"frames": 32, "pairs": 4}

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lrag_ray.scoring.vbench_long.slow_fast import MAPPING, fuse, map_score


def test_the_tables_and_weights_are_the_official_ones(vbench: Path) -> None:
    constants = json.loads((vbench / "constants.json").read_text(encoding="utf-8"))
    for name, table in constants["mapping_table"].items():
        assert MAPPING[name] == tuple(table["y_mapped"])
        for x, y in zip(table["x_clip2clip"], table["y_mapped"], strict=True):
            assert map_score(name, x) == pytest.approx(y, abs=1e-12)
        weights = constants["slow_fast"][name]
        mapped = map_score(name, 0.5)
        expected = weights["w_inclip"] * 0.8 + weights["w_clip2clip"] * mapped
        assert fuse(name, 0.8, 0.5).fused == pytest.approx(expected, abs=1e-12)


def test_between_the_steps_the_table_is_linear_and_beyond_its_ends_it_is_clamped() -> None:
    name = "subject_consistency"
    assert map_score(name, 0.455) == pytest.approx((MAPPING[name][45] + MAPPING[name][46]) / 2)
    assert map_score(name, 0.4555) == pytest.approx(0.9231983095884628)
    assert map_score(name, -0.2) == 0.0
    assert map_score(name, 1.0000001) == 1.0


def test_a_video_of_one_clip_keeps_its_in_clip_score() -> None:
    assert fuse("subject_consistency", 0.7, None).fused == 0.7
    assert fuse("background_consistency", 0.7, 0.0).fused == 0.7

"""What `lrag-ray score VIDEOS` finds out before any cluster is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.config.videos import videos_config
from lrag_ray.errors import WeightsError
from lrag_ray.pipelines.score import is_run
from lrag_ray.pipelines.score_videos import score_videos


def test_a_file_is_no_run(tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(b"anything")
    assert not is_run(str(video)) and not is_run(str(tmp_path))


def test_networks_that_do_not_load_are_told_before_any_video(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"anything")
    weights = tmp_path / "weights" / "amt_model" / "amt-s.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"no network" * 1000)
    config = videos_config([f"scoring.weights={tmp_path}/weights", "scoring.dimensions=[motion_smoothness]"])
    with pytest.raises(WeightsError, match=r"weights of amt_s: .*amt-s\.pth.* --again"):
        score_videos(str(tmp_path / "video.mp4"), config, to=str(tmp_path / "scores"))
    assert not list((tmp_path / "scores").rglob("*.parquet"))

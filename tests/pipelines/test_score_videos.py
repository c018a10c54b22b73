"""What `lrag-ray score VIDEOS` finds out before any cluster is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.config.videos import videos_config
from lrag_ray.errors import WeightsError
from lrag_ray.events import silent
from lrag_ray.pipelines.score import is_run
from lrag_ray.pipelines.score_videos import ScoreVideosJob, VideoScores, loose, score_videos
from lrag_ray.pipelines.video_list import Labels, ListedVideo, VideoList
from lrag_ray.scoring.registry import suite_of
from lrag_ray.scoring.suite import LooseVideoSuite
from lrag_ray.scoring.vbench_long.parquet import rows_to_parquet
from lrag_ray.store.address import Storage
from tests.report.vbench_rows import row


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


def outcome(folder: Path, without: dict[str, set[str]]) -> VideoScores:
    """What is shown of two methods with two prompts each; `without` names dimensions that a video could not have."""
    out = Storage(str(folder))
    videos = []
    for method, value in (("base", 0.5), ("rag", 0.75)):
        for prompt in ("a fox", "a bear"):
            video = ListedVideo(f"{method} {prompt}.mp4", "", "stamp", Labels(method, "", prompt))
            videos.append(video)
            rows = [
                row(loose(video).identity, "clip", name, 0, 32, None, mode="direct", reason="too small")
                if name in without.get(video.name, set())
                else row(loose(video).identity, "clip", name, 0, 32, value, mode="direct")
                for name in ("motion_smoothness", "imaging_quality")
            ]
            out.write(f"direct/{len(videos)}/rows-a.parquet", rows_to_parquet(rows))
    config = videos_config(["scoring.weights=random", "scoring.dimensions=[motion_smoothness, imaging_quality]"])
    suite = suite_of(config.scoring)
    assert isinstance(suite, LooseVideoSuite)
    return ScoreVideosJob(config.scoring, config.engine, suite, VideoList(None, videos), out, silent).outcome(0)


def test_ranks_of_videos_say_what_is_left_out_of_them(tmp_path: Path) -> None:
    made = outcome(tmp_path, {"rag a bear.mp4": {"motion_smoothness"}})
    assert [(g.method, g.average_rank, g.prompts_ranked) for g in made.groups] == [("base", 2, 1), ("rag", 1, 1)]
    assert made.left_out == [
        "all videos: Over the 1 prompt that all methods have; 1 prompt left out because some methods lack scores of "
        "them."
    ]
    (short,) = [video for video in made.videos if video.reason]
    assert (short.scores, short.reason) == ({"imaging_quality": 0.75}, "motion_smoothness: too small")
    assert made.exit_code == 1


def test_a_dimension_that_no_video_has_leaves_the_ranks_of_the_others(tmp_path: Path) -> None:
    every = [f"{method} {prompt}.mp4" for method in ("base", "rag") for prompt in ("a fox", "a bear")]
    made = outcome(tmp_path, {name: {"motion_smoothness"} for name in every})
    assert [(g.method, g.average_rank, g.prompts_ranked) for g in made.groups] == [("base", 2, 2), ("rag", 1, 2)]
    assert made.left_out[1:] == ["Left out of the ranks, because no video has it: Motion smoothness."]

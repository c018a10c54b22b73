"""What ``lrag-ray score VIDEOS`` shows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import get_args

from rich.console import Console

from lrag_ray.cli.score import print_video_scores
from lrag_ray.pipelines.score_videos import GroupResult, VideoResult, VideoScores
from lrag_ray.scoring.vbench_long.names import DimensionName
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.suite import VbenchLong

SCORES = {name: 0.5 + 0.1 * i for i, name in enumerate(get_args(DimensionName))}


def shown(groups: Sequence[GroupResult], videos: Sequence[VideoResult] = ()) -> str:
    scores = VideoScores(0, "scores", "compat", "v.csv", get_args(DimensionName), False, 1, groups, videos, {}, [], 1.0)
    out = io.StringIO()
    print_video_scores(Console(file=out, width=80, markup=False), scores, VbenchLong(VbenchSettings(mode="compat")))
    return out.getvalue()


def test_names_and_numbers_of_videos_fit_a_narrow_terminal() -> None:
    video = VideoResult("a long name of a video.mp4", "", "", "", 0, None, 3, SCORES, "")
    text = shown([GroupResult("", None, "", 1, 3, SCORES, SCORES, None, 0)], [video])
    assert "video            clips  Subject  Background  Motion  Dynamic  Aesthetic  Imaging" in text
    assert "a long name of       3    50.00       60.00   70.00    80.00      90.00   100.00" in text
    assert "Mean over clips (official)" in text and "Mean of the videos' means" in text


def test_methods_stand_beside_one_another_in_one_table_per_duration() -> None:
    groups = [
        GroupResult("longlive", seconds, method, 8, clips, SCORES, SCORES, rank, 8)
        for seconds, clips in ((30.0, 15), (60.0, 30))
        for method, rank in (("infinity_rope", 2.0), ("deep_forcing", 3.0), ("rag", 1.0))
    ]
    text = shown(groups)
    assert "from 0 to 100: longlive, 30 s" in text and "from 0 to 100: longlive, 60 s" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines.count("infinity_rope deep_forcing rag") == 2
    assert lines.count("Subject consistency 50.00 50.00 50.00") == 4, "two means, two durations"
    assert lines.count("Average rank, over 8 prompts 2.00 3.00 1.00") == 2
    assert "Clips 30 30 30" in lines

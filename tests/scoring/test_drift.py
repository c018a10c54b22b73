"""Curves over the time of the video: which clips, which prompts, which score."""

from __future__ import annotations

import numpy as np
import pytest

from lrag_ray.scoring.bootstrap import LEAST_PROMPTS
from lrag_ray.scoring.drift import VideoClips, drift
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import VideoScore, average_ranks

UP = Measure("up", "Up", "", 0, 1, higher_is_better=True)
STARTS = [0, 32, 64, 77]
"""109 frames at 16 fps: three clips and one more that overlaps."""


def clips(method: str, prompt: str, in_clip: list[float], sample: int = 0) -> VideoClips:
    inside = np.array(in_clip)
    final = inside / 2 + 0.4
    video = VideoScore("tiny", method, 27, prompt, sample, {"up": float(final.mean())}, clips=len(in_clip))
    return VideoClips(video, STARTS[: len(in_clip)], 32, 16, {"up": inside}, {"up": final})


def test_clips_are_averaged_by_start_time_over_the_prompts_of_the_table() -> None:
    videos = [clips(method, prompt, [0.9, 0.8, 0.7, 0.6]) for method in "ab" for prompt in "pq"]
    videos += [clips("b", "r", [0.0, 0.0, 0.0, 0.0])]  # a has no r: it is in no table and no curve
    videos[1] = clips("a", "q", [0.5, 0.4, 0.3, 0.2])
    blocks = average_ranks([each.video for each in videos], ["a", "b"], [UP], "clips")
    points = [point for point in drift(videos, blocks) if point.method == "a"]
    assert [point.start_s for point in points] == [0, 2, 4, 77 / 16]
    assert [point.clip for point in points] == [0, 1, 2, 3]
    assert [point.in_clip.mean for point in points] == pytest.approx([0.7, 0.6, 0.5, 0.4])
    assert {point.prompts for point in points} == {2}
    finals = [point.final for point in points]
    assert np.mean(finals) == pytest.approx(blocks[0].rows[0].means["up"]), "the table is the mean of the curve"


def test_the_band_is_over_prompts() -> None:
    level = [0.1 * i for i in range(LEAST_PROMPTS + 2)]
    videos = [clips("a", f"p{i}", [value, 0.5], sample) for i, value in enumerate(level) for sample in range(2)]
    points = drift(videos, average_ranks([each.video for each in videos], ["a"], [UP], "clips"))
    assert points[0].in_clip.lower is not None and points[0].in_clip.upper is not None
    assert points[0].in_clip.lower < points[0].in_clip.mean < points[0].in_clip.upper
    assert points[1].in_clip == pytest.approx((0.5, 0.5, 0.5))


def test_without_common_prompts_or_clips_there_is_no_curve() -> None:
    videos = [clips("a", "p", [0.1, 0.2]), clips("b", "q", [0.1, 0.2])]
    blocks = average_ranks([each.video for each in videos], ["a", "b"], [UP], "clips")
    assert drift(videos, blocks) == []
    ranked = average_ranks([videos[0].video], ["a"], [UP], "clips")
    assert drift([], ranked) == []

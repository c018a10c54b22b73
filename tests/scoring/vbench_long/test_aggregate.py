from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.scoring.vbench_long.aggregate import aggregate
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, Mode
from lrag_ray.scoring.vbench_long.rows import Kind, ScoreRow
from lrag_ray.scoring.vbench_long.slow_fast import MAPPING


def row(
    video: str,
    dimension: str,
    score: float | None,
    first: int = 0,
    count: int = 16,
    *,
    kind: Kind = "clip",
    mode: Mode = "direct",
    reason: str = "",
) -> ScoreRow:
    return ScoreRow(video, kind, dimension, first, count, 8, score, (), reason, mode, "cpu", "float32", "2", "")


@pytest.mark.parametrize("record", ["golden.json", "golden_inmemory.json"])
def test_official_clip_scores_give_the_official_totals(vbench: Path, record: str) -> None:
    golden: dict[str, Any] = json.loads((vbench / record).read_text(encoding="utf-8"))
    rows, durations = [], {}
    for name in DIMENSION_NAMES:
        scores = golden["dimensions"][name]["per_clip"]
        for clip, about in golden["clips"].items():
            index, video = int(clip[-3:]), about["video"]
            value = scores[clip]["inclip" if name in MAPPING else "score"]
            full = len([c for c in golden["clips"].values() if c["video"] == video]) * 16
            durations[video] = full
            rows.append(row(video, name, float(value), 16 * index))
        for video, value in golden["dimensions"][name].get("clip2clip_per_video", {}).items():
            rows.append(row(video, name, value, 0, durations[video], kind="clip_to_clip"))

    result = aggregate(rows, durations)

    assert not result.unscored
    for name in DIMENSION_NAMES:
        official = golden["dimensions"][name]
        assert result.mean_over_clips[name] == pytest.approx(official["global"], abs=1e-12)
        for video, mean in official["per_video_mean_of_clips_DERIVED"].items():
            assert result.per_video[video][name] == pytest.approx(mean, abs=1e-12)
        unit = 100 if name == "imaging_quality" else 1
        means = official["per_video_mean_of_clips_DERIVED"].values()
        assert result.mean_of_video_means[name] == pytest.approx(sum(means) / len(means) / unit, abs=1e-12)
    for clip in result.clips:
        if clip.parts:
            official = golden["dimensions"][clip.dimension]["per_clip"][
                f"{clip.video}_{clip.span.first_frame // 16:03d}"
            ]
            assert clip.parts.fused == pytest.approx(official["fused"], abs=1e-12)
            assert clip.parts.mapped == pytest.approx(official["mapped"], abs=1e-12)


def test_without_a_second_clip_anywhere_subject_consistency_weighs_frame_pairs() -> None:
    rows = [row("a", name, 1.0, count=11) for name in ("subject_consistency", "background_consistency")]
    rows += [row("b", name, 0.5, count=6) for name in ("subject_consistency", "background_consistency")]
    result = aggregate(rows)
    assert result.mean_over_clips["subject_consistency"] == pytest.approx((10 * 1.0 + 5 * 0.5) / 15)
    assert result.mean_over_clips["background_consistency"] == pytest.approx(0.75)


def test_a_video_with_a_gap_is_left_out_and_named() -> None:
    rows = [row("whole", "motion_smoothness", 0.9), row("gap", "motion_smoothness", 0.1)]
    rows.append(row("short", "motion_smoothness", None, reason="needs three frames"))
    rows.append(row("broken", "", None, kind="failure", reason="is truncated"))
    result = aggregate(rows, {"whole": 16, "gap": 32, "short": 16, "broken": 16, "absent": 16})
    assert result.mean_over_clips == {"motion_smoothness": 0.9}
    assert {u.video: u.reason for u in result.unscored} == {
        "gap": "1 of 2 clips are not scored yet",
        "short": "needs three frames",
        "broken": "is truncated",
        "absent": "not scored yet",
    }


def test_a_duration_takes_its_own_clips_and_its_own_clip_to_clip() -> None:
    name = "subject_consistency"
    rows = [row("v", name, score, first) for first, score in ((0, 0.6), (16, 0.8), (8, 0.4))]
    rows += [row("v", name, slow, 0, n, kind="clip_to_clip") for n, slow in ((24, 0.5), (32, 0.9))]
    for frames, firsts in ((24, [0, 8]), (32, [0, 16])):
        clips = aggregate(rows, {"v": frames}).clips
        assert [clip.span.first_frame for clip in clips] == firsts
        assert {clip.parts.clip_to_clip for clip in clips if clip.parts} == {0.5 if frames == 24 else 0.9}
    # One clip: no clip to clip, even where longer durations have one.
    assert aggregate(rows, {"v": 16}).mean_over_clips[name] == 0.6


def test_consistency_without_its_clip_to_clip_is_not_finished() -> None:
    rows = [row("v", "subject_consistency", 0.5, first) for first in (0, 16)]
    assert [u.reason for u in aggregate(rows).unscored] == ["clip to clip is not scored yet"]


def test_modes_are_never_mixed() -> None:
    rows = [row("a", "motion_smoothness", 0.9), row("b", "motion_smoothness", 0.9, mode="compat")]
    with pytest.raises(ValueError, match="compat and direct"):
        aggregate(rows)


def test_of_repeated_rows_the_first_counts() -> None:
    rows = [row("a", "motion_smoothness", 0.9), row("a", "motion_smoothness", 0.1)]
    assert aggregate(rows).mean_over_clips == {"motion_smoothness": 0.9}

"""Whole videos, in the dimension with the smallest network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lrag_ray.scoring.vbench_long import Dimension, Mode, Networks, ScoreRow, VideoSource, aggregate, score_video
from lrag_ray.scoring.vbench_long.clips import spans
from tests.scoring.vbench_long.conftest import VideoMaker

MOTION: list[Dimension] = ["motion_smoothness"]


def score(path: Path, networks: Networks, *durations: int, mode: Mode = "direct", video: str = "v") -> list[ScoreRow]:
    source = VideoSource(path, video, durations)
    return list(score_video(source, networks, dimensions=MOTION, mode=mode))


@pytest.mark.parametrize(
    ("name", "video"),
    [("a_b c.d.mp4", "one"), ("ünï 日本/x.mp4", "日本_x"), ("other/x.mp4", "../x"), ("VIDEO.MP4", "-1")],
)
def test_names_never_matter(name: str, video: str, make_video: VideoMaker, networks: Networks, tmp_path: Path) -> None:
    path = tmp_path / "renamed" / name
    path.parent.mkdir(parents=True)
    plain = score(make_video(), networks)
    shutil.copy(tmp_path / "video.mp4", path)
    odd = score(path, networks, video=video)
    assert {row.video for row in odd} == {video}
    assert [(row.first_frame, row.score) for row in odd] == [(row.first_frame, row.score) for row in plain]
    assert [row.first_frame for row in odd] == [0, 8, 12]


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("odd size", {"size": (67, 71)}),
        ("10 bit", {"pixels": "yuv420p10le"}),
        ("one clip", {"frames": 5}),
        ("variable frame rate", {"at": [0, 1, 2, 5, 6, 7, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]}),
    ],
)
def test_unusual_videos_are_scored(
    what: str, options: dict[str, object], make_video: VideoMaker, networks: Networks
) -> None:
    rows = score(make_video(**options), networks)
    assert rows
    assert all(row.score is not None and 0 <= row.score <= 1 and not row.reason for row in rows)


def test_a_clip_too_short_or_too_small_says_so(make_video: VideoMaker, networks: Networks) -> None:
    (short,) = score(make_video(frames=2), networks)
    assert (short.score, short.reason) == (None, "needs three frames, the clip has 2")
    (small, *_) = score(make_video(size=(32, 32)), networks)
    assert (small.score, small.reason) == (None, "frames of 32x32 are too small for AMT-S")


def test_what_cannot_be_read_is_one_failed_row_and_the_rest_goes_on(
    make_video: VideoMaker, networks: Networks, tmp_path: Path
) -> None:
    good = make_video("good.mp4")
    whole = good.read_bytes()
    broken = {
        "empty": (b"", "is empty"),
        "truncated": (whole[: len(whole) // 2], "truncated"),
        "text": (b"not a video at all" * 100, "no video"),
        "absent": (None, "no video at"),
    }
    rows = []
    for name, (content, _) in broken.items():
        path = tmp_path / f"{name}.mp4"
        if content is not None:
            path.write_bytes(content)
        rows += score(path, networks, video=name)
    rows += score(good, networks, video="good")
    failures = {row.video: row for row in rows if row.kind == "failure"}
    assert set(failures) == set(broken)
    for name, (_, reason) in broken.items():
        assert reason in failures[name].reason
    result = aggregate(rows)
    assert set(result.per_video) == {"good"}
    assert {u.video for u in result.unscored} == set(broken)


def test_odd_sizes_cannot_be_reencoded(make_video: VideoMaker, networks: Networks) -> None:
    rows = score(make_video(size=(67, 71)), networks, mode="compat")
    assert [(row.kind, row.mode) for row in rows] == [("failure", "compat")]
    assert "Mend: mode direct" in rows[0].reason


def test_nested_durations_share_clips_and_equal_videos_of_their_own(make_video: VideoMaker, networks: Networks) -> None:
    whole = make_video(frames=28)
    nested = score(whole, networks, 12, 28)
    assert len({row.key for row in nested}) == len(nested)
    assert {(row.first_frame, row.frame_count) for row in nested} == {*spans(12, 8), *spans(28, 8)}
    for frames in (12, 28):
        alone = aggregate(score(whole, networks, frames))
        assert aggregate(nested, {"v": frames}).clips == alone.clips


def test_a_video_shorter_than_its_duration_fails(make_video: VideoMaker, networks: Networks) -> None:
    rows = score(make_video(frames=20), networks, 32)
    assert rows[-1].kind == "failure"
    assert rows[-1].reason == "the video has 20 frames, 32 were expected"


def test_done_rows_are_not_made_again(make_video: VideoMaker, networks: Networks) -> None:
    path = make_video()
    rows = score(path, networks)
    rest = score_video(VideoSource(path, "v"), networks, dimensions=MOTION, done={rows[0].key, rows[2].key})
    assert list(rest) == [rows[1]]


def test_a_row_says_where_it_comes_from(make_video: VideoMaker, networks: Networks) -> None:
    row = score(make_video(), networks)[0]
    assert (row.kind, row.fps, row.mode, row.device, row.precision) == ("clip", 4, "direct", "cpu", "official")
    assert row.networks.startswith("amt_s:")
    assert len(row.per_frame) == 3
    assert ScoreRow(**{**row.as_dict(), "per_frame": tuple(row.as_dict()["per_frame"])}) == row

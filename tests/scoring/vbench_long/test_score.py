"""Whole videos, in the dimension with the smallest network."""

from __future__ import annotations

import shutil
import threading
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lrag_ray.scoring.flow_discontinuity import Deviations
from lrag_ray.scoring.vbench_long.aggregate import aggregate
from lrag_ray.scoring.vbench_long.clips import ClipSpan, clip_length, cut, spans
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.motion_smoothness import MIN_SIDE
from lrag_ray.scoring.vbench_long.names import DimensionName, Mode
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.rows import ScoreRow
from lrag_ray.scoring.vbench_long.score import VideoSource, score_video
from tests.scoring.vbench_long.conftest import VideoMaker
from tests.video.files import Stream, make

MOTION: list[DimensionName] = ["motion_smoothness"]


def score(path: Path, networks: Networks, *durations: int, mode: Mode = "direct", video: str = "v") -> list[ScoreRow]:
    source = VideoSource(path, video, durations)
    return list(score_video(source, networks, dimensions=MOTION, mode=mode))


NAMES = {"a_b c.d.mp4": "one", "ünï 日本/x.mp4": "日本_x", "other/x.mp4": "../x", "VIDEO.MP4": "-1"}


def test_names_never_matter(make_video: VideoMaker, networks: Networks, tmp_path: Path) -> None:
    plain = score(make_video(), networks)
    assert [row.first_frame for row in plain] == [0, 8, 12]
    for name, video in NAMES.items():
        path = tmp_path / "renamed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "video.mp4", path)
        odd = score(path, networks, video=video)
        assert {row.video for row in odd} == {video}
        assert [(row.first_frame, row.score) for row in odd] == [(row.first_frame, row.score) for row in plain]


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("odd size", {"size": (131, 135)}),
        ("portrait, no multiple of 8", {"size": (130, 162)}),
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


@pytest.mark.parametrize("fps", [8, 16, 24, 25, 30, Fraction(30000, 1001)], ids=str)
@pytest.mark.parametrize("more", [0, 1])
def test_any_rate_is_cut_at_two_seconds_of_whole_frames(fps: int | Fraction, more: int, make_video: VideoMaker) -> None:
    """Given two clips, exactly or with one frame more: the rest is one more clip, which overlaps."""
    length = 2 * int(fps)
    path = make_video(frames=2 * length + more, fps=fps)
    assert int(probe(path).fps) == int(fps)
    firsts = [0, length, length + 1][: 2 + more]
    found = list(cut(decode(path), clip_length(probe(path).fps)))
    assert [clip.span for clip in found] == [ClipSpan(first, length) for first in firsts]


def test_reordered_frames_and_edit_lists_lose_nothing(make_video: VideoMaker) -> None:
    """Given B-frames, whose timestamps an edit list shifts, frames come in the order in which they are shown."""
    plain = np.stack(list(decode(make_video("plain.mp4", options={"bf": "0"}))))
    path = make_video("reordered.mp4", options={"bf": "4", "b_strategy": "0"})
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert any(later < earlier for earlier, later in pairwise(times)), "there are no B-frames"
    shown = np.stack(list(decode(path)))
    assert np.abs(shown.astype(int) - plain).mean() < 3 < np.abs(shown[1:].astype(int) - plain[:-1]).mean()


def test_a_reader_that_stops_early_ends_the_decoding(make_video: VideoMaker, networks: Networks) -> None:
    rows = score_video(VideoSource(make_video(), "v"), networks, dimensions=MOTION)
    assert next(rows).first_frame == 0
    rows.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_clip_too_short_or_too_small_says_so(make_video: VideoMaker, networks: Networks) -> None:
    (short,) = score(make_video(frames=2), networks)
    assert (short.score, short.reason) == (None, "needs three frames, the clip has 2")
    (small, *_) = score(make_video(size=(128, 112)), networks)
    assert (small.score, small.reason) == (None, "frames of 128x112 are too small for AMT-S, which needs sides of 128")


@pytest.mark.parametrize(("side", "numbers"), [(MIN_SIDE, True), (MIN_SIDE - 16, False)])
def test_the_smallest_frames_are_those_that_amt_has_numbers_for(side: int, numbers: bool, networks: Networks) -> None:
    before, after = torch.rand(2, 1, 3, side, 160, generator=torch.Generator().manual_seed(0))
    assert bool(networks.amt.middle(before, after).isfinite().all()) == numbers


def test_what_cannot_be_read_is_one_failed_row_and_the_rest_goes_on(
    make_video: VideoMaker, networks: Networks, tmp_path: Path
) -> None:
    good = make_video("good.mp4")
    whole = good.read_bytes()
    broken = {
        "empty": (b"", "is empty"),
        "truncated": (whole[: len(whole) // 2], "truncated"),
        "text": (b"not a video at all" * 100, "not a video"),
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
    assert "Fix: mode direct" in rows[0].reason


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


@pytest.mark.parametrize("durations", [(), (13, 20)])
def test_the_flow_is_measured_once_per_frame_where_clips_overlap(
    durations: tuple[int, ...], make_video: VideoMaker, networks: Networks
) -> None:
    path = make_video()
    expected = Deviations()
    expected.add_frames(list(decode(path)))
    rows = list(score_video(VideoSource(path, "v", durations, flow=True), networks, dimensions=MOTION))
    (row,) = [row for row in rows if row.kind == "flow"]
    assert (row.dimension, row.frame_count, row.networks) == ("flow_discontinuity", 20, "")
    assert row.per_frame == pytest.approx(expected.values, abs=1e-6)
    again = score_video(
        VideoSource(path, "v", durations, flow=True), networks, dimensions=MOTION, done={r.key for r in rows}
    )
    assert list(again) == []


def test_a_row_says_where_it_comes_from(make_video: VideoMaker, networks: Networks) -> None:
    row = score(make_video(), networks)[0]
    assert (row.kind, row.fps, row.mode, row.device, row.precision) == ("clip", 4, "direct", "cpu", "official")
    assert row.networks.startswith("amt_s:")
    assert len(row.per_frame) == 3
    assert ScoreRow(**{**row.as_dict(), "per_frame": tuple(row.as_dict()["per_frame"])}) == row


def test_a_file_that_declares_no_length_is_scored_and_marked(networks: Networks, tmp_path: Path) -> None:
    path = make(tmp_path / "video.ts", Stream(width=128, height=128, fps=4, frames=9))
    rows = list(score_video(VideoSource(path, "video"), networks, dimensions=["imaging_quality"]))
    assert [(row.kind, row.dimension) for row in rows[:2]] == [("note", ""), ("clip", "imaging_quality")]
    assert "declares no length" in rows[0].reason and rows[0].score is None and rows[1].score is not None
    again = score_video(
        VideoSource(path, "video"), networks, dimensions=["imaging_quality"], done={r.key for r in rows}
    )
    assert list(again) == []

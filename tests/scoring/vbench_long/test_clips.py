from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from lrag_ray.scoring.vbench_long.clips import ClipSpan, Frame, clip_length, cut, spans
from lrag_ray.video.mp4 import VideoError


def _frames(count: int) -> Iterator[Frame]:
    for index in range(count):
        yield np.full((2, 2, 3), index, dtype=np.uint8)


@pytest.mark.parametrize(("fps", "length"), [(8, 16), (5.994, 10), (23.976, 46), (0.5, 0)])
def test_the_frame_rate_is_truncated(fps: float, length: int) -> None:
    assert clip_length(fps) == length


@pytest.mark.parametrize(
    ("count", "firsts", "length"),
    [
        (48, [0, 16, 32], 16),
        (40, [0, 16, 24], 16),  # the last clip overlaps
        (16, [0], 16),
        (17, [0, 1], 16),
        (5, [0], 5),  # shorter than a clip: one clip of all frames
        (0, [], 16),
    ],
)
def test_a_video_is_cut_into_whole_clips_and_an_overlapping_rest(count: int, firsts: list[int], length: int) -> None:
    expected = [ClipSpan(first, length) for first in firsts]
    assert spans(count, 16) == expected
    clips = list(cut(_frames(count), 16))
    assert [clip.span for clip in clips] == expected
    for clip in clips:
        assert [frame[0, 0, 0] for frame in clip.frames] == list(range(clip.span.first_frame, sum(clip.span)))


def test_nested_durations_share_their_clips_and_end_the_reading() -> None:
    given = _frames(100)
    found = [clip.span for clip in cut(given, 16, durations=(20, 48, 55))]
    assert set(found) == {*spans(20, 16), *spans(48, 16), *spans(55, 16)}
    assert len(found) == len(set(found))
    assert next(given)[0, 0, 0] == 55


def test_a_video_that_ends_before_a_duration_is_refused() -> None:
    with pytest.raises(VideoError, match="has 30 frames, 48 were expected"):
        list(cut(_frames(30), 16, durations=(16, 48)))

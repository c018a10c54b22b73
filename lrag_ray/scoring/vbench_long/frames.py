"""Decoded frames as the official decoders give them: decord, which splits videos and reads clips, and OpenCV.

PyAV with its default conversion equals both bit for bit on 8-bit video (but for the inverse transform of MPEG-4 Part 2
and WMV, whose rounding has changed between versions of FFmpeg), colour tags (BT.709 and others) included; the
conversion of `lrag_ray.video.mp4`, made for faithful colours, does not, and scores follow the pixels. What PyAV does
otherwise is done as decord does it: frames are turned as the file says, deep and interlaced ones converted
(`old_scaler`), there are as many frames as packets, and the stream is the one that it picks (`OpenVideo`).
Not followed: decord refuses AV1.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from lrag_ray.scoring.vbench_long.clips import Frame, clip_length
from lrag_ray.scoring.vbench_long.old_scaler import OldScaler
from lrag_ray.video.reader import OpenVideo, VideoError

MAX_CLIP_BYTES = 4 << 30
"""Two seconds of 4K at 80 frames a second."""
MAX_FIRST_FRAMES_BYTES = 16 << 30
"""An hour and a half of 1080p."""


class Rate(NamedTuple):
    """Size as stored, before it is turned, and average frame rate of a video."""

    width: int
    height: int
    fps: float
    declares_length: bool
    """Whether half a download of the file would have been noticed."""


def probe(path: str | Path) -> Rate:
    """Size and rate without decoding.

    Raises:
        VideoError: as `OpenVideo`, or what is held of it while it is scored would not fit into memory.
    """
    with OpenVideo(path) as video:
        rate = Rate(video.stream.width, video.stream.height, video.fps, video.declares_length)
        _check_memory(video, rate.width * rate.height, video.frame_estimate)
    return rate


def decode(source: str | Path | io.BytesIO) -> Iterator[Frame]:
    """All frames in order, one pass; variable frame rates are taken frame by frame.

    The last frame is repeated for every packet that shows none: a video that was cut without being encoded again begins
    with packets that its edit list hides.

    Raises:
        VideoError: as `OpenVideo` and `probe`, or damaged, changing its size, or without a frame.
    """
    size: tuple[int, int] | None = None
    rgb: Frame | None = None
    scaler = OldScaler()
    with OpenVideo(source) as video:
        for frame in video.frames():
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise VideoError(f"{video.name} changes its size at frame {video.decoded}")
            _check_memory(video, frame.width * frame.height, video.decoded + 1)
            # Degrees against the clock. A mirrored file counts as turned, as it does for decord and OpenCV.
            rgb = scaler.rgb(frame, round(frame.rotation / 90) % 4)
            yield rgb
        yield from repeat(rgb, video.packets - video.decoded)


def _check_memory(video: OpenVideo, pixels: int, frame_count: int) -> None:
    """Scoring holds a clip, and the first frame of every clip."""
    length = clip_length(video.fps)
    if not length:
        return
    for held, most, what in (
        (min(frame_count, length), MAX_CLIP_BYTES, "a clip"),
        (frame_count // length, MAX_FIRST_FRAMES_BYTES, "the first frames of its clips"),
    ):
        if held * pixels * 3 > most:
            raise VideoError(
                f"{video.name} is too large to be scored: {what} ({held} frames) would take over {most >> 30} GiB. "
                "Scale it down or cut it: `ffmpeg -t 600 -i FILE -vf scale=1280:-2 out.mp4`"
            )

"""Decoded frames as the official decoders give them: decord, which splits videos and reads clips, and OpenCV.

PyAV with its default conversion equals both bit for bit on 8-bit video, colour tags (BT.709 and others) included; the
conversion of `lrag_ray.video.mp4`, made for faithful colours, does not, and scores follow the pixels. What PyAV does
otherwise is done as decord does it: frames are turned as the file says, deep and interlaced ones converted
(`deep_colour`), and there are as many frames as packets. Not followed: decord refuses AV1.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lrag_ray.scoring.vbench_long.clips import Frame
from lrag_ray.scoring.vbench_long.deep_colour import DeepColour, is_deep
from lrag_ray.video.mp4 import VideoError, video_info


class Rate(NamedTuple):
    """Size as stored, before it is turned, and average frame rate of a video."""

    width: int
    height: int
    fps: float


def probe(path: str | Path) -> Rate:
    """Size and rate without decoding.

    Raises:
        VideoError: missing, empty, truncated, or without a video stream.
    """
    info = video_info(path)
    return Rate(info.width, info.height, info.fps)


def decode(source: str | Path | io.BytesIO) -> Iterator[Frame]:
    """All frames in order, one pass; variable frame rates are taken frame by frame.

    The last frame is repeated for every packet that shows none: a video that was cut without being encoded again begins
    with packets that its edit list hides.

    Raises:
        VideoError: damaged, changing its size, or without a frame.
    """
    import av

    name = "the re-encoded clip" if isinstance(source, io.BytesIO) else str(source)
    opened: Any = source if isinstance(source, io.BytesIO) else str(source)
    size: tuple[int, int] | None = None
    deep: DeepColour | None = None
    count = 0
    try:
        with av.open(opened) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in _shown(container, stream):
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise VideoError(f"{name} changes its size at frame {count}")
                count += 1
                if is_deep(frame) or frame.interlaced_frame:
                    deep = deep or DeepColour(stream)
                    rgb: Any = deep.rgb(frame)
                else:
                    rgb = frame.to_ndarray(format="rgb24")
                # Degrees against the clock. A mirrored file counts as turned, as it does for decord and OpenCV.
                turns = round(frame.rotation / 90) % 4
                yield np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb
    except av.error.FFmpegError as error:
        raise VideoError(f"{name} is damaged after {count} frames: {error.strerror}") from error
    if count == 0:
        raise VideoError(f"{name} holds no video frame")


def _shown(container: Any, stream: Any) -> Iterator[Any]:
    packets = frames = 0
    last = None
    for packet in container.demux(stream):
        # The packet that ends the stream is empty: it asks the decoder for what it holds back.
        packets += packet.size > 0
        for last in packet.decode():
            frames += 1
            yield last
    if frames:
        yield from repeat(last, packets - frames)

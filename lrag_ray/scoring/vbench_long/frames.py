"""Decoded frames as the official decoders give them.

PyAV with its default conversion equals decord and OpenCV bit for bit on 8-bit video; the conversion of
`lrag_ray.video.mp4`, made for faithful colours, does not, and scores follow the pixels. Two things differ from the
official stack of its time (PyAV 12): colour tags such as BT.709, which its splitter ignores, are honoured unless the
caller says otherwise, so that a tagged and an untagged file of the same pictures score alike; and 10-bit video is
converted by newer code, a few grey levels apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lrag_ray.scoring.vbench_long.clips import Frame
from lrag_ray.video.mp4 import VideoError, video_info


class Rate(NamedTuple):
    """Size and average frame rate of a video."""

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


_UNSPECIFIED = 2
"""Code point of "not said" for primaries, transfer and matrix (ITU-T H.273)."""


def decode(source: str | Path | io.BytesIO, *, colour_tags: bool = True) -> Iterator[Frame]:
    """All frames in order, one pass; variable frame rates are taken frame by frame.

    Without `colour_tags`, every file is taken for BT.601, as the official splitter takes it.

    Raises:
        VideoError: damaged, changing its size, or without a frame.
    """
    import av

    name = "the re-encoded clip" if isinstance(source, io.BytesIO) else str(source)
    opened: Any = source if isinstance(source, io.BytesIO) else str(source)
    shape: tuple[int, ...] | None = None
    count = 0
    try:
        with av.open(opened) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if not colour_tags:
                    frame.colorspace = frame.color_primaries = frame.color_trc = _UNSPECIFIED
                rgb: Any = frame.to_ndarray(format="rgb24")
                shape = shape or rgb.shape
                if rgb.shape != shape:
                    raise VideoError(f"{name} changes its size at frame {count}")
                count += 1
                yield rgb
    except av.error.FFmpegError as error:
        raise VideoError(f"{name} is damaged after {count} frames: {error}") from error
    if count == 0:
        raise VideoError(f"{name} holds no video frame")

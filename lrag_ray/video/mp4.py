"""Video files: H.264 writing for people and browsers, and reading of whatever they bring.

Frames are uint8 RGB [N, H, W, 3] as PNG would hold them. Files are yuv420p in BT.709 with limited range and say so in
their tags: an untagged or wrongly converted file shifts the colours that scores and eyes compare.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from lrag_ray.video.decode import Frames
from lrag_ray.video.reader import OpenVideo
from lrag_ray.video.reader import VideoError as VideoError

_BT709 = 1
"""Code point of BT.709 for primaries, transfer and matrix (ITU-T H.273)."""
_LIMITED = 1
_ENCODER_THREADS = 1
"""x264 output depends on its thread count; one thread also leaves the cores to the rollout."""


class VideoInfo(NamedTuple):
    """What the container says of its video stream."""

    width: int
    height: int
    fps: float


class Mp4Writer:
    """Writes frames to an H.264 file that appears under its name only when it is whole.

    ::

        with Mp4Writer("out.mp4", fps=16) as writer:
            writer.write(frames)

    An exception inside the block removes the unfinished file. `crf` is x264's quality, 0 (lossless) to 51.
    """

    def __init__(self, path: str | Path, *, fps: int = 16, crf: int = 18) -> None:
        self.path = Path(path)
        self.frames = 0
        """Frames written so far."""
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial")
        self._fps = fps
        self._crf = crf
        self._container: Any = None
        self._stream: Any = None

    def write(self, frames: Frames) -> None:
        """Append frames [N, H, W, 3]; height and width are even and the same in all calls."""
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [N, H, W, 3]")
        height, width = frames.shape[1:3]
        if self._container is None:
            self._open(height, width)
        if (height, width) != (self._stream.height, self._stream.width):
            raise ValueError(f"frames are {width}x{height} in a {self._stream.width}x{self._stream.height} video")
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                dst_colorspace=Colorspace.ITU709,
                dst_color_primaries=_BT709,
                dst_color_trc=_BT709,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
                threads=1,
            )
            picture.pts = self.frames
            picture.time_base = Fraction(1, self._fps)
            self._container.mux(self._stream.encode(picture))
            self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises:
            ValueError: no frame was written (an empty file is never left behind).
        """
        if self._container is None:
            raise ValueError(f"no frames were written to {self.path}")
        try:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._partial.replace(self.path)
        except BaseException:
            self.abort()
            raise
        self._container = None

    def abort(self) -> None:
        """Drop what was written."""
        if self._container is not None:
            self._container.close()
            self._container = None
        self._partial.unlink(missing_ok=True)

    def _open(self, height: int, width: int) -> None:
        import av

        if height % 2 or width % 2:
            raise ValueError(f"{width}x{height}: yuv420p needs an even width and height")
        # faststart puts the index first, so that a browser plays from a bucket without fetching the end.
        self._container = av.open(str(self._partial), "w", format="mp4", container_options={"movflags": "+faststart"})
        # Equal frames must give equal files, on any node: without cpu-independent, x264's AVX-512 rate control differs
        # from run to run.
        options = {"crf": str(self._crf), "preset": "medium", "threads": str(_ENCODER_THREADS)}
        options["x264-params"] = "cpu-independent=1"
        stream: Any = self._container.add_stream("libx264", rate=self._fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, self._fps)
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        self._stream = stream

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def video_info(path: str | Path) -> VideoInfo:
    """Size and rate, without decoding.

    Raises:
        VideoError: no readable video.
    """
    with OpenVideo(path) as video:
        return VideoInfo(video.stream.width, video.stream.height, video.fps)


def iterate_frames(path: str | Path) -> Iterator[Frames]:
    """Frames [H, W, 3] of a video in any container (see `lrag_ray.video.reader`), in one pass.

    Raises:
        VideoError: no readable video, or one that is damaged or cut short.
    """
    with OpenVideo(path) as video:
        for frame in video.frames():
            yield _rgb(frame)


def frames_at(path: str | Path, indices: Iterable[int]) -> Iterator[Frames]:
    """Frames [H, W, 3] at `indices`, in ascending order; reading ends with the last of them.

    Most of the time of reading is the conversion to RGB, which the other frames are spared.

    Raises:
        VideoError: no readable video, one that is damaged, or one without these frames.
    """
    wanted = sorted(set(indices))
    found = 0
    with OpenVideo(path) as video:
        for index, frame in enumerate(video.frames()):
            if found < len(wanted) and index == wanted[found]:
                yield _rgb(frame)
                found += 1
            if found == len(wanted):
                return
    raise VideoError(f"{path} has no frame {wanted[found]}")


def _rgb(frame: Any) -> Frames:
    from av.video.reformatter import ColorRange, Interpolation

    picture = frame.reformat(
        format="rgb24",
        dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
    )
    rgb: Frames = picture.to_ndarray()
    return rgb


def read_video(path: str | Path) -> Frames:
    """All frames [T, H, W, 3] of a video (see `iterate_frames`)."""
    return np.stack(list(iterate_frames(path)))

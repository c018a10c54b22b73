"""Opening videos: one set of rules for every place that reads one.

- The stream is the one that decord reads: FFmpeg's best, whatever is flagged as the default, and never cover art.
- Only files are read, and only containers of video: no pictures, no playlists or other formats that name further files.
- A file that is shorter than it declares is refused. One that declares no length (see `lrag_ray.video.length`) is
  read as far as it goes, and `OpenVideo.declares_length` is False.
- Size, frames and duration are bounded, before memory is spent where the file declares them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from lrag_ray.errors import LragError
from lrag_ray.video.length import DeclaredLength, OverdeclaredError, declared_length

CONTAINERS = (
    "mov,matroska,avi,flv,mpegts,mpeg,ogg,asf",
    # Streams without a container, and what encoders and cameras write.
    "mpegvideo,h264,hevc,m4v,ivf,yuv4mpegpipe,mxf,nut,dv",
)
"""FFmpeg's names of the formats that are read; none of them opens another file."""
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("mp4", "m4v", "mov", "qt", "3gp", "3g2", "f4v", "mkv", "mk3d", "webm", "avi", "divx", "flv", "wmv", "asf"),
        *("ts", "mts", "m2ts", "m2t", "mpg", "mpeg", "mpe", "m2v", "vob", "ogv", "mxf", "nut", "dv"),
        *("264", "h264", "265", "h265", "hevc", "ivf", "y4m"),
    )
)
"""What files in these formats are called; sound and pictures in the same formats have other suffixes."""
MAX_PIXELS = 8192 * 4320
"""Of a picture: 8K."""
MAX_FRAMES = 2_000_000
"""18 hours at 30 frames a second."""
MAX_DURATION_S = 24 * 3600
_SLACK_S = 0.5
"""How much earlier than declared a video may end where the number of bytes is not declared: writers round, and
recorders take the duration from a clock."""
_SLACK_FRAMES = 2
_NOT_YUV_VIDEO = {
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture. Convert it: `ffmpeg -i FILE -pix_fmt yuv420p out.mp4`",
    b"BM": "a BMP picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF document",
}


class VideoError(LragError):
    """A video cannot be read, or not be re-encoded."""


class OpenVideo:
    """An open video.

    ::

        with OpenVideo("video.mkv") as video:
            for frame in video.frames():
                ...

    Raises:
        VideoError: missing, empty, truncated, too large, not a video, or without a video stream.
    """

    def __init__(self, source: str | Path | io.BytesIO) -> None:
        self.name = "the re-encoded clip" if isinstance(source, io.BytesIO) else str(source)
        self.packets = 0
        """Read so far; decord counts a frame for each."""
        self.decoded = 0
        """Frames so far."""
        path = None if isinstance(source, io.BytesIO) else Path(source)
        declared = ("", DeclaredLength(0)) if path is None else _declared(path)
        self._container = _opened(path, source)
        try:
            self.stream = self._best_stream()
            """The video stream that is read."""
            self._length = declared[1] if declared[0] in self._container.format.name else DeclaredLength()
            if path is not None:
                self._check_size(path)
            self._check_limits()
        except BaseException:
            self._container.close()
            raise

    @property
    def declares_length(self) -> bool:
        """Whether half of the file would have been noticed."""
        return self._length != DeclaredLength()

    @property
    def fps(self) -> float:
        """Average frame rate; 0 where there is none."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0)

    @property
    def frame_estimate(self) -> int:
        """Frames as far as the file says; 0 where it does not."""
        if not self.declares_length:
            return 0
        return int(self.stream.frames) or round(self._duration_s * self.fps)

    @property
    def _duration_s(self) -> float:
        duration = self._container.duration
        return duration / 1e6 if duration and duration > 0 else 0.0

    def frames(self) -> Iterator[Any]:
        """The frames as the decoder gives them; FFmpeg's errors leave the block as `VideoError`.

        Raises:
            VideoError: damaged, shorter than declared, too long, or without a frame.
        """
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        for packet in self._packets():
            for frame in packet.decode():
                yield frame
                self.decoded += 1
            if self.packets > MAX_FRAMES:
                raise VideoError(f"{self.name} has more than {MAX_FRAMES} frames. {_CUT_IT}")
        if self.decoded == 0:
            raise VideoError(f"{self.name} holds no video frame")

    def _packets(self) -> Iterator[Any]:
        end_s = 0.0
        # A declared duration is that of the longest stream, be it sound.
        every = self._length.duration_s is not None
        for packet in self._container.demux() if every else self._container.demux(self.stream):
            at = packet.pts if packet.pts is not None else packet.dts
            if every and at is not None and packet.time_base is not None:
                end_s = max(end_s, float((at + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == self.stream.index:
                # The packet that ends the stream is empty: it asks the decoder for what it holds back.
                self.packets += packet.size > 0
                yield packet
        slack_s = _SLACK_S + (_SLACK_FRAMES / self.fps if self.fps else 0)
        if self._length.duration_s is not None and end_s < self._length.duration_s - slack_s:
            declared = self._length.duration_s
            raise VideoError(f"{self.name} is truncated: it ends after {end_s:.3g} s of {declared:.3g} s. {_FETCH_IT}")

    def _best_stream(self) -> Any:
        """As av_find_best_stream of FFmpeg 4.1, which decord is built with."""
        from av.stream import Disposition

        videos = self._container.streams.video
        if not videos:
            raise VideoError(f"{self.name} has no video stream")
        covers = {stream.index for stream in videos if stream.disposition & Disposition.attached_pic}
        for stream in videos:
            # Later versions read more flags, and go by them. What comes last in all is the flag for the impaired.
            unwanted = stream.index in covers or stream.codec_context is None
            stream.disposition = Disposition.hearing_impaired if unwanted else Disposition(0)
        usable = [stream for stream in videos if stream.index not in covers]
        if not usable:
            raise VideoError(f"{self.name} has no video stream, only cover art")
        best = self._container.streams.best("video")
        if best is None or best.index in covers or best.codec_context is None:
            best = next((stream for stream in usable if stream.codec_context is not None), None)
        if best is None:
            raise VideoError(f"{self.name} is encoded with a codec that this FFmpeg does not decode")
        return best

    def _check_size(self, path: Path) -> None:
        if self._length.size_bytes is None:
            return
        # An mp4 file that is cut short after its index still decodes, to fewer frames.
        indexed = max((entry.pos + entry.size for entry in self.stream.index_entries), default=0)
        size, whole = path.stat().st_size, max(self._length.size_bytes, indexed)
        if whole > size:
            raise VideoError(f"{self.name} is truncated: {size} bytes of at least {whole}. {_FETCH_IT}")

    def _check_limits(self) -> None:
        width, height = self.stream.codec_context.width, self.stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise VideoError(
                f"{self.name} has pictures of {width}x{height}; at most {MAX_PIXELS} pixels (8192x4320) are read. "
                "Scale it down: `ffmpeg -i FILE -vf scale=1920:-2 out.mp4`"
            )
        if not self.declares_length:
            # What writers that were cut off, or that cannot go back, leave in a header means nothing.
            return
        if self._duration_s > MAX_DURATION_S:
            raise VideoError(
                f"{self.name} declares {self._duration_s:.0f} s; at most {MAX_DURATION_S} s are read. {_CUT_IT}"
            )
        if self.stream.frames > MAX_FRAMES:
            raise VideoError(
                f"{self.name} declares {self.stream.frames} frames; at most {MAX_FRAMES} are read. {_CUT_IT}"
            )

    def __enter__(self) -> OpenVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import av

        self._container.close()
        if isinstance(error, av.error.FFmpegError):
            why = error.strerror or "not readable"
            if not self.decoded and not self.stream.codec_context.width:
                why += f", or its pictures have more than {MAX_PIXELS} pixels (8192x4320)"
            raise VideoError(f"{self.name} is damaged after {self.decoded} frames: {why}") from error


_FETCH_IT = "Fetch or write the file again"
_CUT_IT = "Cut it: `ffmpeg -t 3600 -i FILE -c copy out.mp4`"


def _declared(path: Path) -> tuple[str, DeclaredLength]:
    if not path.is_file():
        raise VideoError(f"no video at {path}")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty")
    try:
        return declared_length(path)
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror}") from error
    except OverdeclaredError as error:
        raise VideoError(f"{path} is refused: {error}. {_FETCH_IT}") from error


def _opened(path: Path | None, source: Any) -> Any:
    import av

    options = {"format_whitelist": ",".join(CONTAINERS), "max_pixels": str(MAX_PIXELS)}
    if path is not None:
        # Named as a file, because a name may look like the address of another protocol.
        source = f"file:{path}"
        options["protocol_whitelist"] = "file"
    try:
        return av.open(source, options=options, metadata_errors="replace")
    except av.error.FFmpegError as error:
        if path is None:
            raise VideoError(f"the re-encoded clip cannot be read: {error.strerror}") from error
        raise VideoError(f"{path} is not a video, or is truncated: {_found_instead(path) or error.strerror}") from error


def _found_instead(path: Path) -> str:
    """What a person sees in a file that is not read; empty where that is nothing."""
    with path.open("rb") as file:
        head = file.read(64)
    for magic, kind in _NOT_YUV_VIDEO.items():
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP picture"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis", b"heic", b"mif1"):
            return "a HEIF or AVIF picture"
        return "an mp4 file whose index (moov), often written last, is missing or damaged"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file. Fix: `git lfs pull`"
    text = " ".join(head.decode("latin-1").split())
    if text.isascii() and text.isprintable():
        return f"text that begins with '{text[:32]}'"
    return ""

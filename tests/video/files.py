"""Video files of many containers and codecs, made with PyAV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from lrag_ray.video.decode import Frames


class Stream(NamedTuple):
    """A video stream."""

    codec: str = "libx264"
    width: int = 64
    height: int = 48
    fps: int = 16
    frames: int = 40
    pixels: str = "yuv420p"
    default: bool = True
    cover: bool = False
    bit_rate: int = 1_000_000


def texture(stream: Stream, index: int, seed: int) -> Frames:
    """Colour tiles that move to the left."""
    shape = (stream.height // 8 + 2, (stream.width + 3 * stream.frames) // 8 + 2, 3)
    tiles = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return np.ascontiguousarray(tiles[: stream.height, 3 * index : 3 * index + stream.width])


def make(
    path: Path,
    *streams: Stream,
    container: str | None = None,
    options: Mapping[str, str] | None = None,
    at: Sequence[int] | None = None,
    sound_s: float = 0,
) -> Path:
    """Write streams, interleaved; `at` are the times of all frames in frames."""
    from av.stream import Disposition

    with av.open(str(path), "w", format=container, options=dict(options or {})) as written:
        made: list[Any] = []
        for stream in streams:
            added: Any = written.add_stream(stream.codec, rate=stream.fps, options={"threads": "1", "g": "8"})
            added.width, added.height, added.pix_fmt = stream.width, stream.height, stream.pixels
            added.bit_rate = stream.bit_rate
            added.disposition = (
                Disposition.attached_pic if stream.cover else Disposition.default if stream.default else Disposition(0)
            )
            made.append(added)
        sound: Any = written.add_stream("aac", rate=44100) if sound_s else None
        times = sorted((i / s.fps, k, i) for k, s in enumerate(streams) for i in range(s.frames))
        for _, number, index in times:
            stream = streams[number]
            frame = av.VideoFrame.from_ndarray(texture(stream, index, number), format="rgb24")
            frame.pts, frame.time_base = at[index] if at else index, Fraction(1, stream.fps)
            written.mux(made[number].encode(frame))
        for start in range(0, int(sound_s * 44100), 1024):
            silence: Any = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts, silence.time_base = 44100, start, Fraction(1, 44100)
            written.mux(sound.encode(silence))
        for added in [*made, *([sound] if sound else [])]:
            written.mux(added.encode(None))
    return path

"""Frames against decord, which the official splitter reads videos with."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from decord import VideoReader

from lrag_ray.scoring.vbench_long.frames import decode
from tests.scoring.vbench_long.conftest import VideoMaker
from tests.video.files import Stream, make

_BT709, _FULL = 1, 2
_WHOLE, _LAST = 1 << 16, 1 << 30
"""One, in the fixed point of an mp4 file's display matrix and of its last entry."""


def by_decord(path: Path) -> np.ndarray[Any, Any]:
    reader = VideoReader(str(path), num_threads=1)
    frames: np.ndarray[Any, Any] = reader.get_batch(range(len(reader))).asnumpy()
    return frames


def ours(path: Path) -> np.ndarray[Any, Any]:
    return np.stack(list(decode(path)))


def write(path: Path, *, space: int | None = None, colour_range: int | None = None) -> None:
    """Two colourful frames whose stored bytes do not depend on the tags."""
    planes = np.random.default_rng(0).integers(16, 235, (2, 96, 64), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        context = stream.codec_context
        for plane in planes:
            frame: Any = av.VideoFrame.from_ndarray(plane, format="yuv420p")
            for tagged in (context, frame):
                if space is not None:
                    tagged.colorspace = tagged.color_primaries = tagged.color_trc = space
                if colour_range is not None:
                    tagged.color_range = colour_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_colour_tags_are_honoured_as_the_official_splitter_honours_them(tmp_path: Path) -> None:
    seen = []
    for name, tags in (("plain", {}), ("bt709", {"space": _BT709}), ("full", {"colour_range": _FULL})):
        path = tmp_path / f"{name}.mp4"
        write(path, **tags)
        seen.append(ours(path))
        assert np.array_equal(seen[-1], by_decord(path)), name
    assert all(np.abs(other.astype(int) - seen[0].astype(int)).mean() > 1 for other in seen[1:])


@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p", "yuv422p", "yuv444p"])
def test_every_pixel_format_is_converted_as_decord_does_it(pixels: str, make_video: VideoMaker) -> None:
    path = make_video(frames=3, size=(98, 66), pixels=pixels)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == pixels
    assert np.array_equal(ours(path), by_decord(path))


@pytest.mark.parametrize("size", [(160, 131), (161, 131), (98, 67), (97, 67), (64, 9)], ids=str)
@pytest.mark.parametrize(
    ("codec", "pixels"),
    [("libvpx-vp9", "yuv420p"), ("mpeg2video", "yuv420p"), ("ffv1", "yuv420p"), ("ffv1", "yuv420p10le")],
)
def test_chroma_of_odd_heights_is_spread_as_decord_does_it(
    codec: str, pixels: str, size: tuple[int, int], tmp_path: Path
) -> None:
    stream = Stream(codec, *size, fps=25, frames=3, pixels=pixels)
    path = make(tmp_path / "video.mkv", stream)
    assert np.array_equal(ours(path), by_decord(path))


def test_interlaced_frames_are_converted_as_whole_pictures_as_decord_does_it(make_video: VideoMaker) -> None:
    options = {"flags": "+ildct+ilme", "x264-params": "interlaced=1"}
    path = make_video(frames=3, size=(96, 64), pixels="yuv420p", options=options)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert np.array_equal(ours(path), by_decord(path))


def cut_without_encoding(source: Path, path: Path, start_s: float) -> None:
    """As ``ffmpeg -ss START -i SOURCE -c copy PATH``: from the key frame before; an edit list hides what is early."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as part:
        stream = whole.streams.video[0]
        copy = part.add_stream_from_template(stream)
        assert stream.time_base is not None
        start = round(start_s / stream.time_base)
        whole.seek(start, stream=stream)
        for packet in whole.demux(stream):
            if packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copy
                part.mux(packet)


@pytest.mark.parametrize("b_frames", ["0", "2"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_cut_without_encoding_ends_as_it_does_for_decord(
    b_frames: str, suffix: str, make_video: VideoMaker, tmp_path: Path
) -> None:
    """Given a cut 3 frames after a key frame, which an mp4 file hides: its last frame is repeated for them."""
    whole = make_video(frames=20, options={"g": "8", "keyint_min": "8", "bf": b_frames, "b_strategy": "0"})
    path = tmp_path / f"cut{suffix}"
    cut_without_encoding(whole, path, 11 / 4)
    found = ours(path)
    assert np.array_equal(found, by_decord(path))
    assert len(found) == 12
    repeated = [np.array_equal(frame, found[-1]) for frame in found]
    assert repeated == [False] * 8 + [True] * 4 if suffix == ".mp4" else [False] * 11 + [True]


def turn(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Set the matrix of the track in an mp4 file."""
    a, b, c, d = (value * _WHOLE for value in matrix)
    header = path.read_bytes()
    # Type, version and flags, times, track, duration, reserved, layer, group and volume come before the matrix.
    start = header.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    path.write_bytes(header[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, _LAST) + header[start + 36 :])


_TURNED = pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((-1, 0, 0, 1), 2)],
    ids=["90", "180", "270", "mirrored"],
)


@_TURNED
def test_frames_are_turned_as_the_file_says(
    matrix: tuple[int, int, int, int], turns: int, make_video: VideoMaker
) -> None:
    path = make_video(frames=2, size=(96, 64))
    upright = ours(path)
    turn(path, matrix)
    turned = ours(path)
    assert np.array_equal(turned, by_decord(path))
    assert np.array_equal(turned, np.rot90(upright, turns, axes=(1, 2)))


@_TURNED
@pytest.mark.parametrize("size", [(96, 67), (97, 64), (97, 67)], ids=str)
@pytest.mark.parametrize("codec", ["mpeg4", "libvpx-vp9"])
def test_frames_of_odd_sizes_are_turned_before_their_chroma_is_spread(
    codec: str, size: tuple[int, int], matrix: tuple[int, int, int, int], turns: int, tmp_path: Path
) -> None:
    path = make(tmp_path / "video.mp4", Stream(codec, *size, fps=25, frames=2))
    upright = ours(path)
    turn(path, matrix)
    assert np.array_equal(ours(path), by_decord(path))
    assert ours(path).shape == np.rot90(upright, turns, axes=(1, 2)).shape


@_TURNED
@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuv422p", "yuv422p10le", "yuv444p10le"])
def test_every_pixel_format_is_turned_as_decord_does_it(
    pixels: str, matrix: tuple[int, int, int, int], turns: int, make_video: VideoMaker
) -> None:
    path = make_video(frames=2, size=(98, 66), pixels=pixels)
    turn(path, matrix)
    turned = ours(path)
    assert np.array_equal(turned, by_decord(path))
    assert turned.shape == ((2, 98, 66, 3) if turns % 2 else (2, 66, 98, 3))

"""What is opened, which stream of it, and how half a file is reported from a whole one."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av  # noqa: F401  Before decord, whose own libvpx would be taken otherwise.
import numpy as np
import pytest
from decord import VideoReader

from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.video.mp4 import VideoError, iterate_frames, video_info
from lrag_ray.video.reader import OpenVideo
from tests.video.files import Stream, make

SMALL = Stream(width=64, height=48, fps=4, frames=8, bit_rate=50_000)
LARGE = Stream(width=192, height=128, fps=16, frames=32, bit_rate=2_000_000)
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
DECLARING = {
    "h264.mp4": (Stream(), {}),
    "faststart.mp4": (Stream(), {"movflags": "faststart"}),
    "fragments.mp4": (Stream(), FRAGMENTS),
    "listed.mp4": (Stream(), {"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"}),
    "dash.mp4": (Stream(), {"movflags": "dash"}),
    "mpeg4.mov": (Stream("mpeg4"), {}),
    "h264.mkv": (Stream(), {}),
    "vp8.webm": (Stream("libvpx"), {}),
    "vp9.webm": (Stream("libvpx-vp9"), {}),
    "mpeg4.avi": (Stream("mpeg4"), {}),
    "flv1.flv": (Stream("flv"), {}),
    "h264.flv": (Stream(), {}),
    "wmv2.wmv": (Stream("wmv2"), {}),
    "vp8.ivf": (Stream("libvpx"), {}),
    "mpeg2.mxf": (Stream("mpeg2video", fps=25), {}),
}
UNDECLARING = {
    "h264.ts": (Stream(), {}),
    "mpeg2.mpg": (Stream("mpeg2video", fps=25), {}),
    "vp8.ogv": (Stream("libvpx"), {}),
    "live.mkv": (Stream(), {"live": "1"}),
    "unlisted.mp4": (Stream(), {"movflags": "frag_keyframe+empty_moov+skip_trailer"}),
}
ALL = DECLARING | UNDECLARING


def by_decord(path: Path) -> np.ndarray:
    reader = VideoReader(str(path), num_threads=1)
    frames: np.ndarray = reader.get_batch(range(len(reader))).asnumpy()
    return frames


@pytest.mark.parametrize("name", ALL)
def test_whole_files_are_read_whole(name: str, tmp_path: Path) -> None:
    stream, options = ALL[name]
    path = make(tmp_path / name, stream, options=options)
    assert len(list(decode(path))) == len(list(iterate_frames(path))) == 40
    assert probe(path).declares_length == (name in DECLARING)
    # decord counts no frames of IVF.
    if name in DECLARING and not name.endswith(".ivf"):
        assert np.array_equal(np.stack(list(decode(path))), by_decord(path))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".flv"])
@pytest.mark.parametrize("kind", ["variable rate", "long sound", "one frame", "late start"])
def test_intact_files_of_odd_timing_are_not_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    stream = Stream(frames=1 if kind == "one frame" else 30)
    late = kind == "variable rate"
    at = [i + (i > 9) * 5 + (i > 28) * 60 if late else i + 80 for i in range(30)] if "a" in kind[:2] else None
    sound_s = 4 if kind == "long sound" and suffix != ".avi" else 0
    path = make(tmp_path / f"video{suffix}", stream, at=at, sound_s=sound_s)
    assert len(list(decode(path))) == stream.frames and probe(path).declares_length


@pytest.mark.parametrize("share", [0.1, 0.4, 0.55, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("name", DECLARING)
def test_half_a_file_is_refused(name: str, share: float, tmp_path: Path) -> None:
    stream, options = DECLARING[name]
    path = make(tmp_path / name, stream, options=options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for read in (lambda: list(decode(path)), lambda: list(iterate_frames(path))):
        with pytest.raises(VideoError):
            read()


def test_an_mp4_that_ends_within_its_header_is_refused(tmp_path: Path) -> None:
    """Given sound, whose track comes last: the video's index is whole, or lacks frames at its end alone."""
    path = make(tmp_path / "video.mp4", Stream(), sound_s=2)
    content = path.read_bytes()
    header = content.rindex(b"moov") - 4
    for end in range(header + 16, len(content), 40):
        path.write_bytes(content[:end])
        with pytest.raises(VideoError):
            list(decode(path))


@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.mpg", "vp8.ogv", "live.mkv"])
def test_half_a_file_without_a_declared_length_is_read_and_marked(name: str, tmp_path: Path) -> None:
    stream, options = UNDECLARING[name]
    path = make(tmp_path / name, stream, options=options)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 11 // 20])
    assert 5 < len(list(decode(path))) < 40
    assert not probe(path).declares_length


def test_a_duration_tells_where_no_size_is_declared(tmp_path: Path) -> None:
    """Given Matroska whose segment has an unknown size, as streams have, and a duration."""
    path = make(tmp_path / "video.mkv", Stream(frames=64))
    content = bytearray(path.read_bytes())
    start = content.index(b"\x18\x53\x80\x67") + 4
    content[start : start + 8] = b"\x01" + b"\xff" * 7
    path.write_bytes(content)
    assert len(list(decode(path))) == 64 and probe(path).declares_length
    path.write_bytes(content[: len(content) * 11 // 20])
    with pytest.raises(VideoError, match=r"truncated: it ends after 2\.\d+ s of 4 s"):
        list(decode(path))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
@pytest.mark.parametrize(
    "streams",
    [
        (SMALL, LARGE),
        (LARGE, SMALL),
        (SMALL, LARGE._replace(default=False)),
        (LARGE._replace(default=False), SMALL),
    ],
    ids=["small first", "large first", "small default", "small default last"],
)
def test_the_stream_is_the_one_that_decord_reads(streams: tuple[Stream, ...], suffix: str, tmp_path: Path) -> None:
    path = make(tmp_path / f"video{suffix}", *streams)
    found = np.stack(list(decode(path)))
    assert np.array_equal(found, by_decord(path))
    # mp4 and mov come with bit rates, which decide before frame counts do.
    if suffix in (".mkv", ".avi"):
        assert found.shape == (32, 128, 192, 3) and video_info(path).fps == 16
    assert video_info(path)[:2] == (found.shape[2], found.shape[1])
    assert len(list(iterate_frames(path))) == len(found)


@pytest.mark.parametrize("cover_first", [False, True])
def test_cover_art_is_never_the_video(cover_first: bool, tmp_path: Path) -> None:
    cover = Stream("mjpeg", 320, 240, frames=1, pixels="yuvj420p", cover=True)
    streams = [cover, Stream(frames=1)] if cover_first else [Stream(frames=1), cover]
    path = make(tmp_path / "video.mp4", *streams)
    assert video_info(path)[:2] == (64, 48) and len(list(decode(path))) == 1


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(64, 64), "a PNG picture"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG picture"),
        (b"GIF89a" + bytes(100), "a GIF picture"),
        (b"ffconcat version 1.0\nfile 'other.mp4'\n", "text that begins with 'ffconcat version 1.0"),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nother.mp4\n#EXT-X-ENDLIST\n",
            "text that begins with '#EXTM3U",
        ),
        (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"/>', "text that begins with '<.xml"),
        (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nm=video 5004 RTP/AVP 96\r\n", "text that begins with 'v=0"),
        (b"1\n00:00:00,000 --> 00:00:02,000\nHello\n", "text that begins with '1 00:00"),
    ],
)
def test_only_video_containers_are_opened(content: bytes, message: str, tmp_path: Path) -> None:
    make(tmp_path / "other.mp4", Stream(frames=4))
    path = tmp_path / "video.mp4"
    path.write_bytes(content)
    for read in (probe, video_info, lambda path: list(decode(path)), lambda path: list(iterate_frames(path))):
        with pytest.raises(VideoError, match=message):
            read(path)


def test_a_name_that_looks_like_an_address_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.mp4", Stream(frames=4)).rename(tmp_path / "concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(list(decode("concat:a.mp4"))) == 4


def test_titles_in_another_encoding_are_no_obstacle(tmp_path: Path) -> None:
    path = make(tmp_path / "video.avi", Stream("mpeg4", frames=4))
    content = path.read_bytes()
    at = content.index(b"Lavf")
    path.write_bytes(content[:at] + b"\xe9\xff" + content[at + 2 :])
    assert len(list(decode(path))) == 4


RSS = """
import resource, sys
from lrag_ray.scoring.vbench_long.frames import decode
from lrag_ray.video.reader import VideoError
import av
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        list(decode(path))
    except VideoError as error:
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, error)
"""


def bomb(kind: str, folder: Path) -> Path:
    """A small file that asks for much memory."""
    path = folder / f"{kind}.mp4"
    if kind == "picture":
        path.write_bytes(png(9000, 9000))
    elif kind == "samples":
        content = make(path, Stream(frames=4)).read_bytes()
        at = content.index(b"stsz") + 8
        path.write_bytes(content[:at] + struct.pack(">II", 1, 100_000_000) + content[at + 8 :])
    else:
        content = make(path, Stream(frames=16), options=FRAGMENTS).read_bytes()
        at = content.index(b"trun") + 4
        path.write_bytes(content[:at] + struct.pack(">II", 1, 100_000_000) + content[at + 8 :])
    return path


def test_little_memory_is_spent_on_what_is_refused(tmp_path: Path) -> None:
    messages = {
        "picture": "a PNG picture",
        "samples": "declares 100000000 samples",
        "fragment": "declares 1000000",
    }
    bombs = [str(bomb(kind, tmp_path)) for kind in messages]
    done = subprocess.run([sys.executable, "-c", RSS, *bombs], capture_output=True, text=True, check=True)
    for line, message in zip(done.stdout.splitlines(), messages.values(), strict=True):
        megabytes, _, reason = line.partition(" ")
        assert message in reason and int(megabytes) < 100


def test_limits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "video.mp4", Stream(frames=20))
    for name, value, message in (
        ("MAX_PIXELS", 64 * 48 - 1, "pictures of 64x48"),
        ("MAX_FRAMES", 19, "declares 20 frames; at most 19"),
        ("MAX_DURATION_S", 1, "declares 1 s; at most 1 s"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(f"lrag_ray.video.reader.{name}", value)
            with pytest.raises(VideoError, match=message):
                OpenVideo(path)
    live = make(tmp_path / "live.mkv", Stream(frames=20), options={"live": "1"})
    monkeypatch.setattr("lrag_ray.video.reader.MAX_FRAMES", 19)
    with pytest.raises(VideoError, match="more than 19 frames"):
        list(decode(live))


def test_what_scoring_would_hold_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "video.mp4", Stream(fps=2, frames=20))
    for name, most in (("MAX_CLIP_BYTES", 4 * 64 * 48 * 3), ("MAX_FIRST_FRAMES_BYTES", 5 * 64 * 48 * 3)):
        with monkeypatch.context() as changed:
            changed.setattr(f"lrag_ray.scoring.vbench_long.frames.{name}", most)
            assert len(list(decode(path))) == 20 and probe(path).fps == 2
            changed.setattr(f"lrag_ray.scoring.vbench_long.frames.{name}", most - 1)
            for read in (probe, lambda path: list(decode(path))):
                with pytest.raises(VideoError, match="too large to be scored"):
                    read(path)

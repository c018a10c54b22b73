"""Video files: colours survive, no broken file is left or accepted."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import Mp4Writer, VideoError, iterate_frames, read_video, video_info
from tests.report.make_run import moving_frames


def soft_noise(count: int, seed: int = 0) -> Frames:
    """Frames of 8 px colour tiles that change every frame: hard to compress, kind to chroma subsampling."""
    tiles = np.random.default_rng(seed).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    return tiles.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    with Mp4Writer(tmp_path / "video.mp4") as writer:
        writer.write(soft_noise(33))
    return tmp_path / "video.mp4"


def test_colours_survive_writing_and_reading(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50), (30, 180, 220)]
    frames = np.stack([np.full((32, 48, 3), colour, np.uint8) for colour in colours])
    with Mp4Writer(tmp_path / "flat.mp4", crf=8) as writer:
        writer.write(frames)
    read = read_video(tmp_path / "flat.mp4")
    assert np.abs(read.astype(int) - frames).max() <= 3


def test_file_is_what_browsers_want(video: Path) -> None:
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", Fraction(16))
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)
    content = video.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_frame_count_and_rate(video: Path) -> None:
    assert video_info(video) == (64, 48, 16.0)
    assert read_video(video).shape == (33, 48, 64, 3)


def test_pieces_make_the_same_file_as_one_write(tmp_path: Path) -> None:
    frames = soft_noise(20)
    for name, pieces in (("one", [20]), ("three", [1, 12, 7])):
        with Mp4Writer(tmp_path / f"{name}.mp4") as writer:
            for piece in np.split(frames, np.cumsum(pieces)[:-1]):
                writer.write(piece)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "three.mp4").read_bytes()


def test_equal_frames_make_equal_files(tmp_path: Path) -> None:
    """Two workers that do the same rollout must give the same decoded frames; x264's defaults do not promise it."""
    frames = moving_frames(45, seed=0, speed=2)
    files = set()
    for _ in range(12):
        with Mp4Writer(tmp_path / "video.mp4") as writer:
            writer.write(frames)
        files.add((tmp_path / "video.mp4").read_bytes())
        # What the encoder reads without having written it depends on what the memory held before.
        read_video(tmp_path / "video.mp4")
    assert len(files) == 1


def test_crf_is_quality(tmp_path: Path) -> None:
    sizes = []
    for crf in (10, 40):
        with Mp4Writer(tmp_path / f"{crf}.mp4", crf=crf) as writer:
            writer.write(soft_noise(8))
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[0] > 1.5 * sizes[1]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rollout"), Mp4Writer(tmp_path / "video.mp4") as writer:
        writer.write(soft_noise(5))
        raise RuntimeError("rollout failed")
    assert list(tmp_path.iterdir()) == []


def test_unfinished_file_is_not_under_its_name(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"what was there before")
    writer = Mp4Writer(tmp_path / "video.mp4")
    writer.write(soft_noise(5))
    assert (tmp_path / "video.mp4").read_bytes() == b"what was there before"
    writer.close()
    assert len(read_video(tmp_path / "video.mp4")) == 5


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((1, 5, 8, 3), np.uint8), "even width"),
        (np.zeros((1, 4, 8, 3), np.float32), "float32"),
        (np.zeros((4, 8, 3), np.uint8), r"\[4, 8, 3\]"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, frames: Frames, message: str) -> None:
    with pytest.raises(ValueError, match=message), Mp4Writer(tmp_path / "video.mp4") as writer:
        writer.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_size_may_not_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16x16 in a 64x48"), Mp4Writer(tmp_path / "video.mp4") as writer:
        writer.write(soft_noise(1))
        writer.write(np.zeros((1, 16, 16, 3), np.uint8))


def test_empty_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"), Mp4Writer(tmp_path / "video.mp4"):
        pass


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_truncated_video_is_refused(video: Path, kept: float) -> None:
    content = video.read_bytes()
    video.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(VideoError, match="truncated"):
        read_video(video)


def test_files_that_are_no_video_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no video at"):
        read_video(tmp_path / "nowhere.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="is empty"):
        read_video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    with pytest.raises(VideoError, match=r"is not a video, .*: text that begins with 'not a video not a video"):
        read_video(tmp_path / "text.mp4")
    (tmp_path / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(VideoError, match="Git LFS pointer"):
        read_video(tmp_path / "pointer.mp4")
    (tmp_path / "zeros.mp4").write_bytes(bytes(1000))
    with pytest.raises(VideoError, match=r"truncated: Invalid data found when processing input$"):
        read_video(tmp_path / "zeros.mp4")


def test_an_index_that_was_never_written_is_named(video: Path) -> None:
    """Given a file whose writer died before the end: the index comes last unless it is moved to the front."""
    with av.open(str(video)) as whole, av.open(str(video.with_name("last.mp4")), "w") as written:
        stream = written.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(whole.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    path = video.with_name("last.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"whose index \(moov\), often written last, is missing"):
        video_info(path)


def test_other_codecs_and_odd_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a video_ü (1).avi"
    frames = soft_noise(6)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert video_info(path).fps == 25
    assert np.array_equal(np.stack(list(iterate_frames(path))), frames)

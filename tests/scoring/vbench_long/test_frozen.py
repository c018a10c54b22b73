"""The frozen control says what a video of its held first frame would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

from lrag_ray.scoring.vbench_long.aggregate import aggregate
from lrag_ray.scoring.vbench_long.frames import decode
from lrag_ray.scoring.vbench_long.frozen import CLIPS, score_frozen
from lrag_ray.scoring.vbench_long.names import DimensionName
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.score import VideoSource, score_video
from tests.scoring.vbench_long.conftest import VideoMaker

MOTION: list[DimensionName] = ["motion_smoothness"]
LENGTH = 8


def lossless(path: Path, frame: np.ndarray[Any, Any], count: int) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264rgb", rate=4, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "rgb24"
        for _ in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_it_equals_a_video_of_the_held_frame(make_video: VideoMaker, networks: Networks, tmp_path: Path) -> None:
    video = make_video(frames=20)
    first = next(iter(decode(video)))
    held = lossless(tmp_path / "held.mkv", first, CLIPS * LENGTH)
    assert all(np.array_equal(frame, first) for frame in decode(held))
    control = list(score_frozen(video, "frozen:v", networks, dimensions=MOTION))
    expected = list(score_video(VideoSource(held, "frozen:v"), networks, dimensions=MOTION))
    assert control == expected
    assert aggregate(control, {"frozen:v": CLIPS * LENGTH}).unscored == []


def test_what_is_done_is_left_out(make_video: VideoMaker, networks: Networks) -> None:
    rows = list(score_frozen(make_video(), "frozen:v", networks, dimensions=MOTION, mode="compat"))
    assert [(row.first_frame, row.mode) for row in rows] == [(0, "compat"), (LENGTH, "compat")]
    (last,) = score_frozen(make_video(), "frozen:v", networks, dimensions=MOTION, mode="compat", done={rows[0].key})
    assert last.key == rows[1].key
    done = {row.key for row in rows}
    assert list(score_frozen(make_video(), "frozen:v", networks, dimensions=MOTION, mode="compat", done=done)) == []


def test_a_broken_video_is_one_failed_row(networks: Networks, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"")
    (row,) = score_frozen(tmp_path / "x.mp4", "frozen:v", networks)
    assert (row.kind, row.score) == ("failure", None) and "is empty" in row.reason

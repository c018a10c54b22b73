"""A folder of real videos with odd names and odd contents, made with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.report.make_run import moving_frames

BROKEN = {"empty.mp4", "text.mp4", "truncated.mp4"}


def encode(
    path: Path, frames: np.ndarray[Any, Any], *, fps: int = 4, pixels: str = "yuv420p", pts: Sequence[int] = ()
) -> None:
    """H.264 in the container that the suffix names; `pts` in frames, for a variable rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264" if "444" not in pixels else "libx264rgb", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels if "444" not in pixels else "rgb24"
        stream.codec_context.time_base = Fraction(1, fps)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = pts[index] if pts else index
            picture.time_base = Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def make_folder(folder: Path) -> Path:
    """4 frames a second, so that a clip has 8 frames."""
    frames = moving_frames(20, seed=1, speed=2)
    encode(folder / "a" / "clip_0001.mp4", frames[:16])
    encode(folder / "b" / "clip_0001.mp4", frames[4:])
    encode(folder / "with space, ünï ∞ [x].MP4", frames)
    encode(folder / "ten_bit.mkv", frames[:10], pixels="yuv420p10le")
    encode(folder / "variable.mkv", frames[:9], pts=[0, 1, 2, 5, 6, 7, 9, 10, 14])
    encode(folder / "odd.mkv", np.ascontiguousarray(frames[:9, :113, :127]), pixels="rgb444")
    encode(folder / "short.mp4", frames[:3])
    encode(folder / "single.mp4", frames[:1])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all")
    whole = (folder / "a" / "clip_0001.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not looked at")
    return folder

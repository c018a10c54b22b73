"""What a judge sees of a video: pictures or a file made of its pixels alone. Nothing tells where it comes from."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lrag_ray.chat.messages import Media
from lrag_ray.scoring.judge.settings import JudgeSettings
from lrag_ray.scoring.per_video import frames_of
from lrag_ray.scoring.video_rows import ScoreTarget
from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import Mp4Writer, frames_at

_JPEG_QUALITY = 90
_CRF = 20


def shown_frames(video_frames: int, video_fps: float, fps: float, most: int) -> list[int]:
    """Indices of the frames that are shown: `fps` per second from the first on, at most `most`, evenly spread."""
    count = max(1, min(most, round(video_frames / video_fps * fps)))
    return sorted({min(video_frames - 1, int(i * video_frames / count)) for i in range(count)})


def make_media(video: Path, target: ScoreTarget, settings: JudgeSettings, scratch: Path) -> tuple[Media, ...]:
    """Pictures in their order, or one video, of the first ``target.video_frames`` frames of a local file.

    Raises VideoError.
    """
    if settings.whole_video:
        path = scratch / "shown.mp4"
        with Mp4Writer(path, fps=target.fps, crf=_CRF) as writer:
            for frame in frames_of(video, target.video_frames):
                writer.write(_smaller(frame, settings.max_side, even=True)[None])
        data = path.read_bytes()
        path.unlink()
        return (Media("video/mp4", data, settings.fps),)
    wanted = shown_frames(target.video_frames, target.fps, settings.fps, settings.max_frames)
    return tuple(_pictures(video, wanted, settings.max_side))


def _pictures(video: Path, wanted: list[int], max_side: int) -> Iterator[Media]:
    from PIL import Image

    for frame in frames_at(video, wanted):
        data = io.BytesIO()
        Image.fromarray(_smaller(frame, max_side)).save(data, "JPEG", quality=_JPEG_QUALITY)
        yield Media("image/jpeg", data.getvalue())


def _smaller(frame: Frames, max_side: int, *, even: bool = False) -> Frames:
    """Frame [H, W, 3] whose longest side is at most `max_side`; with `even` both sides are even."""
    from PIL import Image

    height, width = frame.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    step = 2 if even else 1
    size = tuple(max(step, round(side * scale) // step * step) for side in (width, height))
    if size == (width, height):
        return frame
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))

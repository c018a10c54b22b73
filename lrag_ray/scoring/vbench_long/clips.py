"""Two-second clips: how VBench-Long cuts a video, in one pass and with the memory of two clips.

Its semantic splitting, which makes a video of its own of every scene, is off by default there and in published numbers,
and is not done here: a generated video that jumps should lose consistency for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrag_ray.printable import counted
from lrag_ray.video.mp4 import VideoError

Frame = NDArray[np.uint8]
"""RGB [H, W, 3]."""

CLIP_S = 2
"""`long_custom_input` fixes it, whatever the official configuration says."""


class ClipSpan(NamedTuple):
    """Frames of a clip within its video."""

    first_frame: int
    frame_count: int


class Clip(NamedTuple):
    """A clip and its frames."""

    span: ClipSpan
    frames: list[Frame]


def clip_length(fps: float) -> int:
    """Frames of a clip: the frame rate is truncated, not rounded (23.976 gives 46)."""
    return CLIP_S * int(fps)


def spans(frame_count: int, length: int) -> list[ClipSpan]:
    """Clips of a video in order; a rest becomes one more clip of full length that overlaps its predecessor.

    A video shorter than `length` is one clip.
    """
    if frame_count < length:
        return [ClipSpan(0, frame_count)] if frame_count else []
    whole = [ClipSpan(first, length) for first in range(0, frame_count - length + 1, length)]
    return whole if frame_count % length == 0 else [*whole, ClipSpan(frame_count - length, length)]


def cut(frames: Iterable[Frame], length: int, durations: Sequence[int] = ()) -> Iterator[Clip]:
    """The clips of a video while it is decoded, each once, in the order of their last frame.

    `durations` (frame counts) are prefixes that are split as videos of their own: the union of their clips comes out,
    and reading stops at the longest. Without them the whole video is split. At most `length` frames are held.

    Raises:
        VideoError: the video ends before the longest of `durations`.
    """
    recent: deque[Frame] = deque(maxlen=length)
    ends = frozenset(durations)
    count = 0
    for frame in frames:
        recent.append(frame)
        count += 1
        if count % length == 0 or count in ends:
            yield _last(recent, count)
        if ends and count == max(ends):
            return
    if ends:
        raise VideoError(f"the video has {counted(count, 'frame')}, {max(ends)} were expected")
    if count % length:
        yield _last(recent, count)


def _last(recent: deque[Frame], count: int) -> Clip:
    return Clip(ClipSpan(count - len(recent), len(recent)), list(recent))

"""Mode `compat`: frames go through H.264 once, with the encoder settings of the official splitter.

The official splitter writes its clips with torchvision, which leaves the rate control to PyAV, and PyAV before 14.2
asks x264 (medium) for an average of 1024 kbit/s with sliced threads. The number of slices follows the machine there;
here it is fixed, so that scores do not.

The YUV frames that go into the encoder are those of PyAV 12.3 bit for bit, and x264 names the same options in its
files. What comes out still differs from encode to encode, there as here (`lrag_ray.conformance.vbench_compat`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from lrag_ray.scoring.vbench_long.clips import Frame
from lrag_ray.scoring.vbench_long.frames import decode
from lrag_ray.video.mp4 import VideoError

BITRATE = 1_024_000
"""Bits per second, average."""
SLICES = 2
"""Threads, and with them slices, of the encoder."""


def reencode(frames: Sequence[Frame], fps: int) -> list[Frame]:
    """Encode frames at `fps` and decode them again; as many frames come back.

    Raises:
        VideoError: an odd width or height, which yuv420p cannot hold (the official splitter dies of it).
    """
    decoded = list(decode(encode(frames, fps)))
    if len(decoded) != len(frames):
        raise VideoError(f"{len(frames)} frames went into the encoder, {len(decoded)} came back")
    return decoded


def encode(frames: Sequence[Frame], fps: int) -> io.BytesIO:
    """The mp4 file of a clip, in memory.

    Raises:
        VideoError: as `reencode`.
    """
    import av

    height, width = frames[0].shape[:2]
    if height % 2 or width % 2:
        raise VideoError(f"{width}x{height} cannot be re-encoded: yuv420p needs even sizes. Fix: mode direct")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # A negative crf switches PyAV's own constant quality off; what is left is the average bitrate.
        stream.options = {"crf": "-1"}
        stream.bit_rate = BITRATE
        stream.codec_context.thread_count = SLICES
        stream.codec_context.thread_type = "SLICE"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    return buffer

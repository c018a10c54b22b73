from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from lrag_ray.scoring.vbench_long.frames import decode

_BT709, _UNSPECIFIED = 1, 2


def write(path: Path, tag: int) -> None:
    """Two colourful frames whose stored bytes do not depend on the tag."""
    random = np.random.default_rng(0)
    planes = random.integers(16, 235, (2, 96, 64), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = tag
        for plane in planes:
            frame = av.VideoFrame.from_ndarray(plane, format="yuv420p")
            frame.colorspace = frame.color_primaries = frame.color_trc = tag
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_colour_tags_are_honoured_or_taken_for_bt601_as_the_official_splitter_takes_them(tmp_path: Path) -> None:
    """golden/vbench/decoders.json: decoders that honour BT.709 and those that do not are about 4 grey levels apart."""
    tagged, plain = tmp_path / "bt709.mp4", tmp_path / "plain.mp4"
    write(tagged, _BT709)
    write(plain, _UNSPECIFIED)
    with av.open(str(tagged)) as container:
        assert container.streams.video[0].codec_context.colorspace == _BT709
    untagged = list(decode(plain))
    assert len(untagged) == 2
    assert all(map(np.array_equal, decode(tagged, colour_tags=False), untagged))
    assert all(map(np.array_equal, decode(plain, colour_tags=False), untagged))
    apart = np.abs(np.stack(list(decode(tagged))).astype(int) - np.stack(untagged).astype(int)).mean()
    assert 1 < apart < 12

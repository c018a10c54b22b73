"""Networks with the recipe's weights, built when a test first needs them and kept for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights


@pytest.fixture(scope="session")
def networks() -> Networks:
    return Networks(RandomWeights(), "cpu")


@pytest.fixture(scope="session")
def vbench(golden: Path) -> Path:
    return golden / "vbench"


VideoMaker = Callable[..., Path]


@pytest.fixture
def make_video(tmp_path: Path) -> VideoMaker:
    """Writes a moving texture; any name, size, rate and pixel format."""

    def make(
        name: str = "video.mp4",
        *,
        frames: int = 20,
        size: tuple[int, int] = (128, 128),
        fps: int | Fraction = 4,
        pixels: str = "yuv444p",
        at: Sequence[int] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        texture = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + frames, 3), dtype=np.uint8)
        texture = texture.repeat(8, axis=0).repeat(8, axis=1)
        with av.open(str(path), "w", format="mp4") as container:
            stream: Any = container.add_stream(
                "libx264", rate=fps, options={"crf": "10", "threads": "1", **(options or {})}
            )
            stream.width, stream.height, stream.pix_fmt = width, height, pixels
            for index in range(frames):
                image = np.ascontiguousarray(texture[:height, 3 * index : 3 * index + width])
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = at[index] if at else index
                frame.time_base = 1 / Fraction(fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make

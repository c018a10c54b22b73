from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrag_ray.scoring.vbench_long.clips import cut
from lrag_ray.scoring.vbench_long.frames import decode
from lrag_ray.scoring.vbench_long.reencode import reencode


@pytest.mark.parametrize(("video", "fps"), [("shapes", 6), ("slowpan", 8), ("hardcut", 8)])
def test_clips_come_out_as_the_official_splitter_writes_them(vbench: Path, video: str, fps: int) -> None:
    """Repeated official encodes of the same frames differ a little; ours differ no more."""
    for index, clip in enumerate(cut(decode(vbench / "videos" / f"{video}.mp4"), 2 * fps)):
        official = np.stack(list(decode(vbench / "clips" / f"{video}_{index:03d}.mp4"))).astype(int)
        ours = np.stack(reencode(clip.frames, fps)).astype(int)
        source = np.stack(clip.frames).astype(int)
        assert ours.shape == official.shape
        assert np.abs(ours - official).mean() < 0.25
        assert np.abs(source - official).mean() > 1

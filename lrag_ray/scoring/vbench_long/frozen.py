"""The frozen control: a video's first frame, held. It shows how far a dimension rewards stillness."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lrag_ray.scoring.vbench_long.clips import ClipSpan, clip_length
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, DimensionName, Mode
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.reencode import reencode
from lrag_ray.scoring.vbench_long.rows import RowKey, ScoreRow
from lrag_ray.scoring.vbench_long.score import ClipScorer
from lrag_ray.video.mp4 import VideoError

CLIPS = 2
"""Clips that the frame is held for: all clips of a held frame score alike, so two stand for any duration."""


def score_frozen(
    path: str | Path,
    video: str,
    networks: Networks,
    *,
    dimensions: Sequence[DimensionName] = DIMENSION_NAMES,
    mode: Mode = "direct",
    early_stop: bool = True,
    done: Container[RowKey] = (),
) -> Iterator[ScoreRow]:
    """Rows of `CLIPS` clips, then of clip to clip, for the first frame of the video at `path`, filed under `video`.

    The first clip is computed and stands for the others. A video that cannot be read gives one row of kind
    ``failure``. Rows whose key is in `done` are left out.
    """
    scorer = ClipScorer(video, networks, mode=mode, early_stop=early_stop)
    try:
        rate = probe(path)
        scorer.fps = int(rate.fps)
        length = clip_length(rate.fps)
        if length == 0:
            raise VideoError(f"{path} has {rate.fps:.3g} frames a second; clips need at least one")
        first = next(iter(decode(path)))
        frames = [first] * length
        if mode == "compat":
            frames = reencode(frames, scorer.fps)
        spans = [ClipSpan(position * length, length) for position in range(CLIPS)]
        # What the last clip lacks, the first is computed for: one clip's rows are written together.
        lacking = [name for name in dimensions if RowKey(video, "clip", name, *spans[-1]) not in done]
        for row in scorer.clip(spans[0], frames, lacking):
            for span in spans:
                copy = replace(row, first_frame=span.first_frame)
                if copy.key not in done:
                    yield copy
        firsts = [frames[0]] * CLIPS
        if mode == "compat":
            firsts = reencode(firsts, scorer.fps)
        yield from scorer.clip_to_clip(CLIPS * length, firsts, dimensions, done)
    except VideoError as error:
        yield scorer.row("failure", "", ClipSpan(0, 0), None, str(error), ())

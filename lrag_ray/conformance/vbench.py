"""Golden vectors of VBench-Long: official scores of clips under the recipe's weights.

A record of official frames is run on the shipped clips and first-frame videos, one of frames cut in memory on the
source videos in mode direct. Every network runs in float32, on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lrag_ray.conformance import vbench_compat, vbench_parts
from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder
from lrag_ray.conformance.vbench_frames import (
    clips_of,
    first_frames,
    golden_clips,
    is_in_memory,
    missing_files,
    networks,
    recognises,
    source_of,
    videos_of,
)
from lrag_ray.scoring.vbench_long import dynamic_degree
from lrag_ray.scoring.vbench_long.aggregate import aggregate
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, DimensionName
from lrag_ray.scoring.vbench_long.rows import RowKey, ScoreRow
from lrag_ray.scoring.vbench_long.score import ClipScorer, VideoSource, score_video
from lrag_ray.scoring.vbench_long.slow_fast import MAPPING

UNIT = Bound(absolute=1e-5)
"""Scores on 0..1."""
RATING = Bound(absolute=1e-3)
"""MUSIQ's 0..100."""
GREY = Bound(absolute=1e-2)
"""Error of a predicted frame in grey levels; it is truncated to whole levels, pixel by pixel."""
PIXELS = Bound(absolute=1e-3)
"""Length of a flow."""

_PER_FRAME: Mapping[str, Bound] = {
    "motion_smoothness": GREY,
    "dynamic_degree": PIXELS,
    "aesthetic_quality": Bound(absolute=1e-4),
    "imaging_quality": RATING,
}


def cases(folder: Folder) -> list[GoldenCase]:
    """One case per record and dimension, and those of the parts."""
    scores = [
        GoldenCase(f"{record.path.stem} {name}", partial(_check, folder, record, name))
        for record in folder.records
        if recognises(record)
        for name in DIMENSION_NAMES
        if name in record.content["dimensions"]
    ]
    return [*scores, *vbench_compat.cases(folder), *vbench_parts.cases(folder)]


def _check(folder: Folder, record: CaseRecord, name: DimensionName, sheet: Sheet) -> None:
    if missing := missing_files(record):
        sheet.add("clips", "skip", missing)
        return
    golden = record.content["dimensions"][name]
    rows = [row for video in videos_of(record) for row in _rows(record, video, name)]
    for row in rows:
        if row.reason:
            sheet.add(f"{row.video} from frame {row.first_frame}", "fail", row.reason)
    names = _clip_names(record, rows)
    scored = {names[row.key]: row for row in rows if row.key in names and row.score is not None}
    bound = RATING if name == "imaging_quality" else UNIT
    official = golden["per_clip"]
    own = "inclip" if name in MAPPING else "score"
    _compare(sheet, "clips", {c: row.score for c, row in scored.items()}, _of(official, own), bound)
    _check_per_frame(folder, record, name, scored, sheet)
    if name == "dynamic_degree":
        _check_decisions(record, scored, official, sheet)
    if name in MAPPING:
        slow = {row.video: row.score for row in rows if row.kind == "clip_to_clip"}
        official_slow = golden.get("clip2clip_per_video") or {}
        if official_slow and not slow:
            sheet.add(
                "clip to clip", "skip", "the first-frame videos are not there; the rest is fused with official ones"
            )
            rows += _official_slow(rows, official_slow)
        else:
            _compare(sheet, "clip to clip", slow, official_slow, UNIT)
        rows = _as_looked_up(rows, record, golden, sheet)
    result = aggregate(rows)
    if name in MAPPING:
        by_key = {(row.video, row.first_frame): clip for clip, row in scored.items()}
        parts = {by_key[clip.video, clip.span.first_frame]: clip for clip in result.clips}
        _compare(
            sheet, "mapped", {c: p.parts.mapped for c, p in parts.items() if p.parts}, _of(official, "mapped"), UNIT
        )
        _compare(sheet, "fused", {c: p.score for c, p in parts.items()}, _of(official, "fused"), UNIT)
    _compare(sheet, "global", {"": result.mean_over_clips.get(name)}, {"": golden["global"]}, UNIT)
    derived = golden.get("per_video_mean_of_clips_DERIVED", {})
    means = {video: scores[name] for video, scores in result.per_video.items()}
    _compare(sheet, "video means", means, derived, bound)


def _official_slow(rows: list[ScoreRow], slow: Mapping[str, float]) -> list[ScoreRow]:
    """Clip-to-clip rows of the videos with official scores instead of ours."""
    last = {row.video: row for row in sorted(rows, key=lambda row: row.first_frame) if row.kind == "clip"}
    return [
        replace(last[video], kind="clip_to_clip", first_frame=0, frame_count=sum(last[video].key[3:]), score=score)
        for video, score in slow.items()
        if video in last
    ]


def _as_looked_up(rows: list[ScoreRow], record: CaseRecord, golden: Mapping[str, Any], sheet: Sheet) -> list[ScoreRow]:
    """Rows without the clip-to-clip scores that the official code loses: it looks them up by the name's first part.

    It takes a lost score as 0, and fused scores are then the in-clip ones.
    """
    clips = record.content["clips"]
    lost = {
        clips[clip]["video"]
        for clip, values in golden["per_clip"].items()
        if not values.get("clip2clip") and clips[clip]["video"] in (golden.get("clip2clip_per_video") or {})
    }
    for video in sorted(lost):
        sheet.add(f"{video} fused", "skip", "the official code lost its clip-to-clip score, which ours does not")
    return [replace(row, score=0.0) if row.kind == "clip_to_clip" and row.video in lost else row for row in rows]


def _check_decisions(
    record: CaseRecord, scored: Mapping[str, ScoreRow], official: Mapping[str, Any], sheet: Sheet
) -> None:
    """What dynamic_degree compares, clip by clip."""
    for clip, row in scored.items():
        golden = official[clip]
        if "pairs_over" not in golden:
            continue
        width, height = record.content["clips"][clip]["size"]
        limit = dynamic_degree.threshold(height, width)
        used = len(range(0, row.frame_count, dynamic_degree.sampling_interval(row.fps)))
        ours = {
            "threshold": limit,
            "count_needed": dynamic_degree.pairs_needed(used),
            "pairs": len(row.per_frame),
            "pairs_over": sum(radius > limit for radius in row.per_frame),
        }
        sheet.same(f"{clip} pairs", ours, {key: golden[key] for key in ours})


def _of(official: Mapping[str, Any], part: str) -> dict[str, float]:
    return {clip: values[part] for clip, values in official.items()}


def _compare(
    sheet: Sheet, label: str, got: Mapping[str, float | None], golden: Mapping[str, float], bound: Bound
) -> None:
    """One row with the worst of many numbers; a missing number is a row of its own that fails."""
    for absent in sorted(golden.keys() - {key for key, value in got.items() if value is not None}):
        sheet.add(f"{label} {absent}".strip(), "fail", "we have no score")
    sheet.close_all(
        label,
        {
            key or label: (_number(value), _number(golden[key]), bound)
            for key, value in got.items()
            if value is not None and key in golden
        },
    )


def _number(value: float) -> torch.Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _check_per_frame(
    folder: Folder, record: CaseRecord, name: DimensionName, scored: Mapping[str, ScoreRow], sheet: Sheet
) -> None:
    path = record.path.with_name(record.path.name.replace("golden", "per_frame", 1))
    lists = folder.record(path)
    if path == record.path or lists is None or name not in lists.content or name not in _PER_FRAME:
        return
    pairs = {
        clip: (torch.tensor(scored[clip].per_frame).double(), torch.tensor(values).double(), _PER_FRAME[name])
        for clip, values in lists.content[name].items()
        if clip in scored
    }
    sheet.close_all("per frame", pairs)


def _rows(record: CaseRecord, video: str, name: DimensionName) -> Iterator[ScoreRow]:
    if is_in_memory(record):
        yield from score_video(
            VideoSource(source_of(record, video), video), networks(), dimensions=[name], early_stop=False
        )
        return
    scorer = ClipScorer(video, networks(), early_stop=False)
    length = 0
    for clip in golden_clips(record, video):
        scorer.fps = clip.fps
        yield from scorer.clip(clip.span, clip.frames, [name])
        length = sum(clip.span)
    firsts = first_frames(record, video, name.removesuffix("_consistency")) if name in MAPPING else None
    if firsts and len(clips_of(record, video)) > 1:
        yield from scorer.clip_to_clip(length, firsts, [name])


def _clip_names(record: CaseRecord, rows: list[ScoreRow]) -> dict[RowKey, str]:
    """The golden name of each clip row: the n-th clip of its video in the order of names."""
    names: dict[RowKey, str] = {}
    for video in videos_of(record):
        clips = sorted((row for row in rows if row.video == video and row.kind == "clip"), key=lambda r: r.first_frame)
        names.update({row.key: clip for row, clip in zip(clips, clips_of(record, video), strict=False)})
    return names

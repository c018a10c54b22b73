"""Golden vectors of VBench-Long: official scores of clips under the recipe's weights.

A record of official frames is run on the shipped clips and first-frame videos, one of frames cut in memory on the
source videos in mode direct. Every network runs in float32, on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import Folder, Record
from lrag_ray.scoring.vbench_long import (
    DIMENSIONS,
    ClipScorer,
    Dimension,
    Networks,
    RandomWeights,
    ScoreRow,
    VideoSource,
    aggregate,
    score_video,
)
from lrag_ray.scoring.vbench_long.clips import Span
from lrag_ray.scoring.vbench_long.frames import decode
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
    """One case per record and dimension."""
    return [
        GoldenCase(f"{record.path.stem} {name}", partial(_check, folder, record, name))
        for record in folder.records
        if recognises(record)
        for name in DIMENSIONS
        if name in record.content["dimensions"]
    ]


def recognises(record: Record) -> bool:
    """Whether a JSON file holds scores of clips in our dimensions."""
    return (
        record.holds("clips", "dimensions")
        and isinstance(record.content["dimensions"], dict)
        and any("per_clip" in record.content["dimensions"].get(name, {}) for name in DIMENSIONS)
    )


@cache
def _networks() -> Networks:
    return Networks(RandomWeights(), "cuda" if torch.cuda.is_available() else "cpu", precision="float32")


def _check(folder: Folder, record: Record, name: Dimension, sheet: Sheet) -> None:
    golden = record.content["dimensions"][name]
    rows = list(_rows(folder.path, record, name, sheet))
    if not rows:
        return
    names = _clip_names(record.content["clips"], rows)
    for row in rows:
        if row.reason:
            sheet.add(f"{row.video} from frame {row.first_frame}", "fail", row.reason)
    scored = {names[row.key]: row for row in rows if row.kind == "clip" and row.score is not None}
    bound = RATING if name == "imaging_quality" else UNIT
    official = golden["per_clip"]
    own = "inclip" if name in MAPPING else "score"
    _compare(
        sheet, "clips", {c: row.score for c, row in scored.items()}, {c: v[own] for c, v in official.items()}, bound
    )
    _check_per_frame(folder, record, name, scored, sheet)
    if name in MAPPING:
        slow = {row.video: row.score for row in rows if row.kind == "clip_to_clip"}
        if not slow and golden["clip2clip_per_video"]:
            sheet.add("clip to clip", "skip", "the first-frame videos are not there")
            return
        _compare(sheet, "clip to clip", slow, golden["clip2clip_per_video"], UNIT)
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
    folder: Folder, record: Record, name: Dimension, scored: Mapping[str, ScoreRow], sheet: Sheet
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


def _rows(root: Path, record: Record, name: Dimension, sheet: Sheet) -> Iterator[ScoreRow]:
    content = record.content
    videos = sorted({str(clip["video"]) for clip in content["clips"].values()})
    if "inmemory" in record.path.stem.replace("_", "") or "in memory" in content.get("note", ""):
        for video in videos:
            path = root / "videos" / f"{video}.mp4"
            if not path.is_file():
                sheet.add(video, "skip", f"{path.name} is not among the videos")
                return
            source = VideoSource(path, video)
            yield from score_video(source, _networks(), dimensions=[name], early_stop=False)
        return
    clips = _folder_of(root, [f"{clip}.mp4" for clip in content["clips"]])
    if clips is None:
        sheet.add("clips", "skip", "no folder holds the clips of this record")
        return
    kind = name.removesuffix("_consistency")
    for video in videos:
        own = sorted(clip for clip, about in content["clips"].items() if about["video"] == video)
        yield from _official_frames(root, clips, kind, video, own, content["clips"], name)


def _official_frames(
    root: Path, clips: Path, kind: str, video: str, own: list[str], about: Mapping[str, Any], name: Dimension
) -> Iterator[ScoreRow]:
    """Rows of one video from its shipped clips; they count as laid end to end, the last one overlapping."""
    scorer = ClipScorer(video, _networks(), fps=int(about[own[0]]["fps"]), early_stop=False)
    length = 0
    for clip in own:
        frames = list(decode(clips / f"{clip}.mp4"))
        yield from scorer.clip(Span(length, len(frames)), frames, [name])
        length += len(frames)
    firsts = root / f"firstframes_{kind}" / f"{video}.mp4"
    if len(own) > 1 and firsts.is_file():
        yield from scorer.clip_to_clip(length, list(decode(firsts)), [name])


def _folder_of(root: Path, names: list[str]) -> Path | None:
    """The folder under `root` that holds all of the named files."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    return next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)


def _clip_names(about: Mapping[str, Any], rows: Iterable[ScoreRow]) -> dict[Any, str]:
    """The golden name of each clip row: the n-th clip of its video in the order of names."""
    names: dict[Any, str] = {}
    for video in {row.video for row in rows}:
        own = sorted(clip for clip, values in about.items() if values["video"] == video)
        clips = sorted((row for row in rows if row.video == video and row.kind == "clip"), key=lambda r: r.first_frame)
        names.update({row.key: clip for row, clip in zip(clips, own, strict=False)})
    return names

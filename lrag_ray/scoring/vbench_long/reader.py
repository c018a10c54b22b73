"""A run's VBench-Long scores, read back from its row files: per video and duration, and the frozen control.

Rollouts are read one after the other and only clip scores are kept, so that a long run fits into memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lrag_ray.scoring.drift import VideoClips
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY, discontinuity
from lrag_ray.scoring.ranks import Unit, VideoScore
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import Suite
from lrag_ray.scoring.vbench_long.aggregate import Aggregate, ClipScore, aggregate
from lrag_ray.scoring.vbench_long.clips import clip_length
from lrag_ray.scoring.vbench_long.dimensions import DIMENSIONS, as_shares
from lrag_ray.scoring.vbench_long.names import Mode
from lrag_ray.scoring.vbench_long.parquet import (
    folder,
    frozen_folder,
    frozen_identity,
    is_untrained,
    rollout_folder,
    rows_from_parquet,
    video_identity,
)
from lrag_ray.scoring.vbench_long.rows import ScoreRow
from lrag_ray.store.address import Storage
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo

_FILES_AT_ONCE = 256
_FROZEN = re.compile(r"^.+/controls/frozen/([^/]+)/([^/]+)-(\d{1,18})$", re.ASCII | re.DOTALL)


def read_scores(
    scores: Scores, run: RolloutRun, videos: Mapping[RolloutId, Sequence[CommittedVideo]], mode: Mode
) -> None:
    """Add all scores of a mode to `scores`, from 0 to 1. Files that cannot be read count as missing."""
    storage, identity = run.storage, run.require()
    files: dict[str, list[str]] = {}
    for path in sorted(path for path in storage.list_files(folder(mode)) if path.endswith(".parquet")):
        files.setdefault(path.rpartition("/")[0], []).append(path)
    wanted = {rollout_folder(mode, rollout.path): rollout for rollout in videos}
    seen = set()
    for place, rows in _rows_by_folder(scores, storage, files, list(wanted), mode):
        _add_rollout(scores, videos[wanted[place]], rows)
        seen.add(place)
    scores.pending += sum(len(videos[rollout]) for place, rollout in wanted.items() if place not in seen)
    controls = {}
    for place in files:
        # From what is stored: the run may claim any number of samples.
        match = _FROZEN.match(place)
        if match is None or match[1] not in identity.backbones or match[2] not in identity.prompts:
            continue
        sample = int(match[3])
        if sample < identity.samples and place == frozen_folder(mode, match[1], match[2], sample):
            controls[place] = (match[1], (match[2], sample))
    for place, rows in _rows_by_folder(scores, storage, files, list(controls), mode):
        _add_frozen(scores, *controls[place], rows)


def _rows_by_folder(
    scores: Scores, storage: Storage, files: Mapping[str, Sequence[str]], folders: Sequence[str], mode: Mode
) -> Iterator[tuple[str, list[ScoreRow]]]:
    """Rows of each of `folders` that has any, in their order; `scores` learns of files that are none."""
    present = [place for place in folders if place in files]
    for start in range(0, len(present), _FILES_AT_ONCE):
        chunk = present[start : start + _FILES_AT_ONCE]
        contents = storage.read_many([path for place in chunk for path in files[place]])
        for place in chunk:
            rows: list[ScoreRow] = []
            for path in files[place]:
                try:
                    found = rows_from_parquet(contents.pop(path, b""))
                except pa.ArrowException:
                    scores.damaged.append(path)
                    continue
                rows += [row for row in found if _is_sound(row, mode)]
            yield place, rows


def _is_sound(row: ScoreRow, mode: Mode) -> bool:
    """Whether the row says what its place says it does: files may come from strangers."""
    return row.mode == mode and row.fps > 0 and (row.score is not None or bool(row.reason))


def _add_rollout(scores: Scores, videos: Sequence[CommittedVideo], rows: Sequence[ScoreRow]) -> None:
    """Take every duration from the video with scores of most dimensions for it, the committed file before others."""
    by_video: dict[str, list[ScoreRow]] = {}
    for row in rows:
        # A row that names another rollout's video has no business here.
        if row.video.startswith(video_identity(videos[0].rollout.path, "")):
            by_video.setdefault(row.video, []).append(row)
    used = set()
    for committed in videos:
        own = video_identity(committed.rollout.path, committed.video.sha256)
        found = {
            video: aggregate(by_video[video], {video: committed.frames})
            for video in sorted(by_video, key=lambda video: video != own)
        }
        best = max(found, key=lambda video: len(found[video].mean_over_clips), default=None)
        if best is None:
            scores.pending += 1
            continue
        if found[best].clips:
            clips = _video_clips(committed, found[best], by_video[best])
            scores.clips.append(clips)
            scores.videos.append(clips.video)
            used.add(best)
        missing = found[best].unscored
        scores.pending += any(gap.pending for gap in missing)
        if reasons := [f"{gap.dimension}: {gap.reason}".removeprefix(": ") for gap in missing if not gap.pending]:
            scores.failures[committed.video.path] = "; ".join(reasons)
    for video in used:
        _note_origin(scores, by_video[video])


def _video_clips(committed: CommittedVideo, found: Aggregate, rows: Sequence[ScoreRow]) -> VideoClips:
    by_dimension: dict[str, list[ClipScore]] = {}
    for clip in found.clips:
        by_dimension.setdefault(clip.dimension, []).append(clip)
    final = {name: _scaled(name, [clip.score for clip in clips]) for name, clips in by_dimension.items()}
    in_clip = {
        name: _scaled(name, [clip.parts.in_clip if clip.parts else clip.score for clip in clips])
        for name, clips in by_dimension.items()
    }
    spans = [clip.span for clip in next(iter(by_dimension.values()))]
    rollout = committed.rollout
    return VideoClips(
        video=VideoScore(
            backbone=rollout.backbone,
            method=rollout.method,
            latent_frames=committed.latent_frames,
            prompt_id=rollout.prompt_id,
            sample=rollout.sample,
            values={name: fmean(values) for name, values in final.items()} | _flow(committed, rows),
            clips=len(spans),
        ),
        first_frames=[span.first_frame for span in spans],
        frame_count=spans[0].frame_count,
        fps=rows[0].fps,
        in_clip=in_clip,
        final=final,
    )


def _flow(committed: CommittedVideo, rows: Sequence[ScoreRow]) -> dict[str, float]:
    """The flow discontinuity at this duration; empty where it was not measured that far."""
    deviations = next((row.per_frame for row in rows if row.kind == "flow"), ())
    if len(deviations) < committed.frames - 3:
        return {}
    found = discontinuity(deviations, committed.frames, committed.frames_per_block, committed.cold_chunk)
    return {} if found is None else {FLOW_DISCONTINUITY.name: found}


def _add_frozen(scores: Scores, backbone: str, unit: Unit, rows: Sequence[ScoreRow]) -> None:
    video = frozen_identity(backbone, *unit)
    own = [row for row in rows if row.video == video]
    # Where two runs have it, the first one's counts, as with rollouts.
    if not own or unit in scores.frozen.get(backbone, {}):
        return
    # All clips of a held frame score alike: two stand for a video of any length.
    found = aggregate(own, {video: 2 * clip_length(own[0].fps)})
    if found.clips:
        values = as_shares(found.per_video[video])
        scores.frozen.setdefault(backbone, {})[unit] = values
        _note_origin(scores, own)


def _note_origin(scores: Scores, rows: Sequence[ScoreRow]) -> None:
    for row in rows:
        scores.computed[f"{row.device}, {row.precision} precision, torch {row.torch}"] += 1
        scores.networks.update(row.networks.split())
        scores.untrained |= is_untrained(row)


def _scaled(name: str, values: Sequence[float]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64) / DIMENSIONS[name].full_scale


def clips_table(scores: Scores, suite: Suite[Any]) -> pa.Table:
    """All clips with their final and in-clip scores."""
    tables = []
    for clips in scores.clips:
        count, video = len(clips.first_frames), clips.video
        constant = {
            "suite": suite.name,
            "mode": suite.mode,
            "backbone": video.backbone,
            "method": video.method,
            "latent_frames": video.latent_frames,
            "prompt_id": video.prompt_id,
            "sample": video.sample,
            "frame_count": clips.frame_count,
        }
        columns: dict[str, Any] = {name: [value] * count for name, value in constant.items()}
        columns |= {"first_frame": clips.first_frames, "start_s": np.asarray(clips.first_frames) / clips.fps}
        for measure in suite.measures:
            columns[measure.name] = clips.final.get(measure.name)
            columns[f"in_clip_{measure.name}"] = clips.in_clip.get(measure.name)
        absent = pa.nulls(count, pa.float64())
        tables.append(pa.table({name: absent if column is None else column for name, column in columns.items()}))
    return pa.concat_tables(tables) if tables else pa.table({})

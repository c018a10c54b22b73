"""Scores of one video: a single decode, every dimension on each clip, rows as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY, Deviations
from lrag_ray.scoring.vbench_long.clips import Clip, ClipSpan, Frame, clip_length, cut, spans
from lrag_ray.scoring.vbench_long.consistency import consistency
from lrag_ray.scoring.vbench_long.dimension import Measured, SlowFeatures, UnscorableClipError, mean_of
from lrag_ray.scoring.vbench_long.dimensions import DIMENSIONS
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, DimensionName, Mode
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NetworkName
from lrag_ray.scoring.vbench_long.prefetch import prefetch
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames
from lrag_ray.scoring.vbench_long.reencode import reencode
from lrag_ray.scoring.vbench_long.rows import Kind, RowKey, ScoreRow
from lrag_ray.video.mp4 import VideoError

UNDECLARED = (
    "the file declares no length, so if it is only the first part of a video, nobody can tell. To be sure, compare it "
    "with its source"
)
"""Note of a file of which half a download would be scored without a word."""


@dataclass(frozen=True)
class VideoSource:
    """A video to score."""

    path: str | Path
    video: str
    """Identity under which its rows are filed; any text, unique among the scored videos."""
    durations: tuple[int, ...] = ()
    """Frame counts of prefixes that are videos of their own (nested durations); empty for the whole video."""
    flow: bool = False
    """Also give the row of kind ``flow``, for videos whose blocks are known."""


def score_video(
    source: VideoSource,
    networks: Networks,
    *,
    dimensions: Sequence[DimensionName] = DIMENSION_NAMES,
    mode: Mode = "direct",
    early_stop: bool = True,
    done: Container[RowKey] = (),
) -> Iterator[ScoreRow]:
    """Rows of all clips, then of clip to clip per duration; clips that durations share are scored once.

    Where `source` asks for it, a row with the deviations of the optical flow of all frames follows. Both modes take it
    from the decoded frames. A video that cannot be read ends in one row of kind ``failure``; a dimension that a clip is
    too short or too small for gives a row with its reason. A file that declares no length has a row of kind ``note``.
    Rows whose key is in `done` are left out. Nothing but wrong use, missing weights and errors of the device is raised.
    """
    scorer = ClipScorer(source.video, networks, mode=mode, early_stop=early_stop)
    first_frames: dict[ClipSpan, Frame] = {}
    frame_count = 0
    try:
        rate = probe(source.path)
        scorer.fps = int(rate.fps)
        length = clip_length(rate.fps)
        if length == 0:
            raise VideoError(f"{source.path} has {rate.fps:.3g} frames a second; clips need at least one")
        note = scorer.row("note", "", ClipSpan(0, 0), None, UNDECLARED, ())
        if not rate.declares_length and note.key not in done:
            yield note
        deviations = Deviations()
        for (span, frames), decoded in prefetch(_clips(source, length, scorer.fps, mode)):
            first_frames[span] = frames[0]
            # Clips come in the order of their last frames and may overlap.
            if source.flow and sum(span) > frame_count:
                deviations.add_frames(decoded[frame_count - sum(span) :])
            frame_count = max(frame_count, sum(span))
            yield from scorer.clip(span, frames, dimensions, done)
        for duration in source.durations or (frame_count,):
            clips = spans(duration, length)
            if len(clips) > 1:
                frames = [first_frames[span] for span in clips]
                if mode == "compat":
                    frames = reencode(frames, scorer.fps)
                yield from scorer.clip_to_clip(duration, frames, dimensions, done)
        if source.flow and deviations.values:
            measured = Measured(fmean(deviations.values), tuple(deviations.values))
            row = scorer.row("flow", FLOW_DISCONTINUITY.name, ClipSpan(0, frame_count), measured, "", ())
            if row.key not in done:
                yield row
    except VideoError as error:
        yield scorer.row("failure", "", ClipSpan(0, frame_count), None, str(error), ())


def _clips(source: VideoSource, length: int, fps: int, mode: Mode) -> Iterator[tuple[Clip, list[Frame]]]:
    """Clips as they are scored, and their frames as they were decoded."""
    for clip in cut(decode(source.path), length, source.durations):
        yield clip if mode == "direct" else Clip(clip.span, reencode(clip.frames, fps)), clip.frames


@dataclass
class ClipScorer:
    """Scores of one video's clips, for callers that have the frames."""

    video: str
    networks: Networks
    fps: int = 0
    """Truncated frame rate; known before the first clip."""
    mode: Mode = "direct"
    """What the rows say of where the frames come from."""
    early_stop: bool = True

    def clip(
        self, span: ClipSpan, frames: Sequence[Frame], dimensions: Sequence[DimensionName], done: Container[RowKey] = ()
    ) -> Iterator[ScoreRow]:
        """One row per dimension that is not done."""
        pending = [name for name in dimensions if RowKey(self.video, "clip", name, *span) not in done]
        if not pending:
            return
        on_device = ClipFrames(frames, self.fps, self.networks.device)
        for name in pending:
            dimension = DIMENSIONS[name]
            score = dimension.score if self.early_stop else dimension.score_in_full or dimension.score
            yield self._measured("clip", name, span, partial(score, on_device, self.networks), dimension.networks)

    def clip_to_clip(
        self, duration: int, frames: Sequence[Frame], dimensions: Sequence[DimensionName], done: Container[RowKey] = ()
    ) -> Iterator[ScoreRow]:
        """One row per consistency dimension that is not done, from the first frames of the clips of `duration`."""
        whole = ClipSpan(0, duration)
        pending = [
            (name, slow)
            for name in dimensions
            if (slow := DIMENSIONS[name].slow) and RowKey(self.video, "clip_to_clip", name, *whole) not in done
        ]
        if not pending:
            return
        stacked = ClipFrames(frames, self.fps, self.networks.device).uint8
        for name, slow in pending:
            yield self._measured("clip_to_clip", name, whole, partial(self._slow, slow, stacked), slow.networks)

    def _slow(self, slow: SlowFeatures, first_frames: Tensor) -> Measured:
        return mean_of(consistency(slow.features(first_frames, self.networks)), "two clips")

    def _measured(
        self,
        kind: Kind,
        name: DimensionName,
        span: ClipSpan,
        measure: Callable[[], Measured],
        used: tuple[NetworkName, ...],
    ) -> ScoreRow:
        try:
            with self.networks.numerics():
                measured = measure()
        except UnscorableClipError as reason:
            return self.row(kind, name, span, None, str(reason), used)
        if not math.isfinite(measured.score):
            return self.row(kind, name, span, None, "the network gave no finite value", used)
        return self.row(kind, name, span, measured, "", used)

    def row(
        self,
        kind: Kind,
        dimension: str,
        span: ClipSpan,
        measured: Measured | None,
        reason: str,
        used: tuple[NetworkName, ...],
    ) -> ScoreRow:
        """A row with its provenance."""
        digests = self.networks.digests
        return ScoreRow(
            video=self.video,
            kind=kind,
            dimension=dimension,
            first_frame=span.first_frame,
            frame_count=span.frame_count,
            fps=self.fps,
            score=measured.score if measured else None,
            per_frame=measured.per_frame if measured else (),
            reason=reason,
            mode=self.mode,
            device=self.networks.device_kind,
            precision=self.networks.precision,
            torch=torch.__version__,
            networks=" ".join(f"{name}:{digests[name]}" for name in used if name in digests),
        )

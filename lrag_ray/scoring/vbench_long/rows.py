"""One scored value and where it came from: the rows that a scoring run writes and reads back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from lrag_ray.scoring.vbench_long.names import Mode

Kind = Literal["clip", "clip_to_clip", "flow", "failure", "note"]


class RowKey(NamedTuple):
    """What a row is the value of; two rows with one key say the same."""

    video: str
    kind: Kind
    dimension: str
    first_frame: int
    frame_count: int


@dataclass(frozen=True)
class ScoreRow:
    """A score of a clip, of a video's first frames against each other, or the reason why a video has none."""

    video: str
    """Identity of the video, chosen by the caller; never taken apart."""
    kind: Kind
    """clip: in-clip score. clip_to_clip: slow score of the first `frame_count` frames. failure: the video is out.
    flow: deviations of the optical flow over the first `frame_count` frames, see `scoring.flow_discontinuity`.
    note: what a person should know of it, in `reason`."""
    dimension: str
    """Name of the dimension; empty in a failure of the whole video."""
    first_frame: int
    """Index of the first frame in the video, from 0."""
    frame_count: int
    """Frames of the clip; for clip_to_clip the frames of the video (or of its prefix) that were split into clips."""
    fps: int
    """Truncated frame rate, which sets the length of a clip."""
    score: float | None
    """0..1, or 0..100 for imaging_quality; None where there is a reason instead."""
    per_frame: tuple[float, ...]
    """What the score is the summary of: one value per frame or pair, in the unit of the dimension's module."""
    reason: str
    """Why there is no score, or what a note says; empty where there is a score."""
    mode: Mode
    device: str
    """Kind of device that computed it."""
    precision: str
    """See `Networks.precision`."""
    torch: str
    """Version of torch."""
    networks: str
    """``name:digest`` of every network that the score depends on, separated by spaces."""

    @property
    def key(self) -> RowKey:
        """What this is the value of."""
        return RowKey(self.video, self.kind, self.dimension, self.first_frame, self.frame_count)

    def as_dict(self) -> dict[str, Any]:
        """Columns of a table row, `per_frame` as a list."""
        return {**asdict(self), "per_frame": list(self.per_frame)}

"""A scoring suite from outside the package: length of the video, times a factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.per_video import PerVideoSuite, VideoScorer, frames_of
from lrag_ray.scoring.video_rows import ScoreTarget


@dataclass(frozen=True)
class LengthSettings:
    """Of `Length`."""

    factor: int = 1
    away: str = ""
    """While this file is there, videos of rag cannot be scored."""


class Length(PerVideoSuite[LengthSettings]):
    """Named as ``tests.cluster.outside_suite:Length``."""

    name = "length"
    Settings = LengthSettings
    measures = (Measure("frames", "Frame count", "Frames times the factor", lower=0, upper=1e9, higher_is_better=True),)

    def scorer(self, *, threads: int, device: str) -> VideoScorer:
        """Counts frames."""

        def score(video: Path, target: ScoreTarget) -> Mapping[str, float]:
            if self.settings.away and Path(self.settings.away).exists() and target.method == "rag":
                raise RuntimeError("the judge is away")
            return {"frames": self.settings.factor * sum(1 for _ in frames_of(video, target.video_frames))}

        return score

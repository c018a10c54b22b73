"""The scores behind a report, in one form for all suites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lrag_ray.scoring.drift import VideoClips
from lrag_ray.scoring.ranks import Unit, VideoScore
from lrag_ray.scoring.video_rows import VideoRow


@dataclass
class Scores:
    """Values of one suite (and mode), of one run or several."""

    videos: list[VideoScore] = field(default_factory=list)
    """Videos at durations with the values that they have, in prompt-major order."""
    clips: list[VideoClips] = field(default_factory=list)
    """The clips behind them, where the suite has clips."""
    rows: list[VideoRow] = field(default_factory=list)
    """The stored rows behind them, where the suite stores one per video."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a video has no score, or misses measures, by its path."""
    damaged: list[str] = field(default_factory=list)
    """Score files, relative to their run, that cannot be read; what they held counts as pending."""
    pending: int = 0
    """Videos at durations that are not scored, or not in full, and may still be."""
    frozen: dict[str, dict[Unit, Mapping[str, float]]] = field(default_factory=dict)
    """Control: the first frame held. Values by measure, by backbone and unit."""
    untrained: bool = False
    """Networks had random weights: the numbers mean nothing."""
    computed: Counter[str] = field(default_factory=Counter)
    """How rows were computed (device, precision, versions), and how many."""
    networks: set[str] = field(default_factory=set)
    """``name:digest`` of all networks behind the values."""

    records: list[Any] = field(default_factory=list)
    """Stored records of suites that store something else than a row per video."""
    remarks: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    """What stands under a video, by the rollout's path and latent frames; written by a model, so text alone."""
    remarks_on_all: list[str] = field(default_factory=list)
    """What is known of all values together, such as how far raters agree."""

    @property
    def dimensions(self) -> set[str]:
        """Measures that any video has."""
        return {name for video in self.videos for name in video.values}

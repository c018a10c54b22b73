"""What a dimension is, what it says of a clip, and why it may say nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.vbench_long.names import DimensionName
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NetworkName
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames


class UnscorableClipError(Exception):
    """A clip has no value in a dimension; the message is the reason."""


class Measured(NamedTuple):
    """Score of a clip and the values that it summarises."""

    score: float
    per_frame: tuple[float, ...]


InClipScore = Callable[[ClipFrames, Networks], Measured]


class SlowFeatures(NamedTuple):
    """How the first frames of a video's clips are compared with each other (slow-fast fusion)."""

    networks: tuple[NetworkName, ...]
    features: Callable[[Tensor, Networks], Tensor]
    """Features [N, C] of uint8 frames [N, 3, H, W]."""


@dataclass(frozen=True)
class Dimension:
    """Everything that VBench-Long has to know of one of its dimensions."""

    name: DimensionName
    title: str
    formula: str
    """What is computed, in one sentence."""
    networks: tuple[NetworkName, ...]
    """Networks of the score within a clip."""
    score: InClipScore
    """Score within a clip."""
    score_in_full: InClipScore | None = None
    """The same score without stopping early; None where `score` never does."""
    slow: SlowFeatures | None = None
    """Comparison from clip to clip; None for dimensions that are not fused with it."""
    full_scale: float = 1.0
    """Largest value of `score`; tables have all dimensions from 0 to 1."""

    @property
    def measure(self) -> Measure:
        """The dimension as a column of tables."""
        return Measure(self.name, self.title, self.formula, lower=0, upper=1, higher_is_better=True, unit="percent")

    @property
    def all_networks(self) -> tuple[NetworkName, ...]:
        """Networks of both scores."""
        return self.networks + (self.slow.networks if self.slow else ())


def mean_of(values: Sequence[float], needs: str) -> Measured:
    """The mean of per-frame or per-pair values.

    Raises:
        UnscorableClipError: there are none; `needs` says what would be needed.
    """
    if not values:
        raise UnscorableClipError(f"needs {needs}")
    return Measured(fmean(values), tuple(values))

"""Settings of VBench-Long, which a configuration has as keys of its scoring section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lrag_ray.config.schema import ScoringSection
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, DimensionName, Mode
from lrag_ray.scoring.vbench_long.networks import Precision
from lrag_ray.scoring.vbench_long.weights import WeightFiles

RANDOM = "random"
"""Value of `scoring.weights` for untrained networks."""


@dataclass(frozen=True)
class VbenchSettings:
    """See `ScoringSection` for what the fields mean."""

    mode: Mode = "direct"
    dimensions: tuple[DimensionName, ...] = DIMENSION_NAMES
    weights: str | None = None
    precision: Precision = "official"
    early_stop: bool = True
    batch_frames: int | None = None
    batch_pairs: int | None = None
    controls: tuple[Literal["frozen"], ...] = ()

    @classmethod
    def of(cls, scoring: ScoringSection) -> VbenchSettings:
        """From a configuration."""
        return cls(
            mode=scoring.mode,
            dimensions=tuple(scoring.dimensions),
            weights=scoring.weights,
            precision=scoring.precision,
            early_stop=scoring.early_stop,
            batch_frames=scoring.batch_frames,
            batch_pairs=scoring.batch_pairs,
            controls=tuple(scoring.controls),
        )

    @property
    def untrained(self) -> bool:
        """Whether the networks have random weights."""
        return self.weights == RANDOM

    @property
    def files(self) -> WeightFiles:
        """Where the networks' files are."""
        return WeightFiles(Path(self.weights) if self.weights and not self.untrained else None)

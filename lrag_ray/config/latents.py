"""The configuration of a latent corpus: ``job: latents``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from lrag_ray.config.schema import BackboneConfig, MethodConfig, Name, PromptsSection, RunConfig, ScoringSection

DEFAULTS: dict[str, Any] = {
    "backbones": {"longlive": {"preset": "longlive"}},
    "methods": {"base": {"method": "base", "window": 12, "sink": 3}},
}
"""What a latent corpus is made with where nothing is named: LongLive with its native window and sink."""


class SampledPromptsSection(PromptsSection):
    """Which prompts: a random sample of a file."""

    ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of the file's prompts, rounded down, at least one. `limit` then keeps the first n of the sample."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Seed of the sample. Ratio and seed alone fix it: it is the one that the released generate_latent.py draws, which
    counts blank lines of a text file as prompts."""


class LatentsConfig(RunConfig):
    """A latent corpus: rollouts that are stored and not decoded."""

    job: Literal["latents"] = "latents"  # type: ignore[assignment]  # each job has its own name
    """What this file describes."""
    prompts: SampledPromptsSection
    """Prompts."""
    backbones: dict[Name, BackboneConfig] = Field(min_length=1)
    """Generators by name, whose latents have one shape; a file without this section takes LongLive."""
    methods: dict[Name, MethodConfig] = Field(min_length=1)
    """Method settings by name; a file without this section takes base with window 12 and sink 3, LongLive's own."""
    durations_s: list[float] = Field(default=[22.5], min_length=1, max_length=100)
    """Lengths in seconds; the dataset holds the longest. 22.5 s are 90 latent frames."""
    verification_videos: int = Field(default=2, ge=0, le=1_000_000)
    """The first n rollouts are decoded as well, so that a person can look at them. Free to change."""
    scoring: ScoringSection = ScoringSection(suite="none")
    """None: a corpus is not scored."""

    @field_validator("scoring")
    @classmethod
    def _not_scored(cls, value: ScoringSection) -> ScoringSection:
        if value.suite != "none":
            raise ValueError(
                f"a corpus is not scored, so suite must be none, not {value.suite}. `lrag-ray score RUN` scores its "
                "verification videos"
            )
        return value

    def decoded(self, rollouts: int) -> int:
        """How many of the first `rollouts` get a video."""
        return min(rollouts, self.verification_videos) if self.video.enabled else 0

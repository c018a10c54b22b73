"""The run configuration as typed models. Every field is documented; unknown keys are refused.

A loaded `RunConfig` is complete: presets are merged in, so nothing else needs to know of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from lrag_ray.wan.config import SamplerConfig, WanConfig

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
"""Names become path components: letters, digits, ``_ . -``, not starting with a dot."""


class Section(BaseModel):
    """Base of every configuration section."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    """Where the run lives and what seeds it."""

    uri: str
    """Address of the run directory: a folder or any fsspec address (s3://bucket/run)."""
    seed: int = 0
    """Run seed of the keyed noise."""


class PromptsSection(Section):
    """Which prompts."""

    path: str | None = None
    """UTF-8 text file, one prompt a line; blank lines are skipped but keep their line number."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many prompts."""
    count: int | None = Field(default=None, ge=1)
    """Number of prompts to plan for while the file is not there yet; ignored by `run`."""
    samples: int = Field(default=1, ge=1)
    """Independent samples per prompt."""


class LatentShape(Section):
    """Shape of one latent frame."""

    channels: int = 16
    """Latent channels."""
    height: int = Field(default=60, ge=2)
    """Latent rows; pixels / 8."""
    width: int = Field(default=104, ge=2)
    """Latent columns; pixels / 8."""


class LoraConfig(Section):
    """Low-rank weights merged into the transformer at load."""

    path: str
    """LoRA checkpoint."""
    rank: int = Field(default=256, ge=1)
    """Rank of the update."""
    alpha: float = 256.0
    """Scaling numerator: the update is alpha / rank * B A."""


class WeightsConfig(Section):
    """Where the transformer's weights come from: a checkpoint, or a random recipe for the tiny backbone."""

    path: str | None = None
    """Checkpoint file (.pt or .safetensors)."""
    use_ema: bool = False
    """Take ``generator_ema`` instead of ``generator``."""
    lora: LoraConfig | None = None
    """LoRA merged at load."""
    random_seed: int | None = None
    """Build random weights from this seed instead of reading a checkpoint."""

    @model_validator(mode="after")
    def _one_source(self) -> WeightsConfig:
        if (self.path is None) == (self.random_seed is None):
            raise ValueError("give exactly one of path (a checkpoint) and random_seed (a random recipe)")
        return self


class TextEncoderConfig(Section):
    """The text encoder; `tiny` is a random two-layer UMT5 over bytes."""

    kind: Literal["tiny", "umt5"] = "umt5"
    """Which encoder."""
    path: str | None = None
    """umt5: checkpoint file or Diffusers folder."""
    tokenizer: str | None = None
    """umt5: folder with the tokenizer files."""


class VaeConfig(Section):
    """The video VAE; `tiny` is AutoencoderKLWan with a small base width and random weights."""

    kind: Literal["tiny", "wan"] = "wan"
    """Which VAE."""
    path: str | None = None
    """wan: ``Wan2.1_VAE.pth`` or a Diffusers folder."""


class BackboneConfig(Section):
    """One frozen generator with its text encoder and VAE."""

    preset: str | None = None
    """Preset whose values are the defaults of this section (see `lrag-ray run --help`)."""
    label: str = ""
    """Shown in tables and pages beside the name, e.g. ``tiny, untrained``."""
    transformer: WanConfig = WanConfig()
    """Sizes of the transformer."""
    sampler: SamplerConfig = SamplerConfig()
    """Denoising steps, shift, frames per block."""
    weights: WeightsConfig
    """Checkpoint or random recipe."""
    latent: LatentShape = LatentShape()
    """Shape of a latent frame."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of weights and activations."""
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    """Text encoder."""
    vae: VaeConfig = VaeConfig()
    """Video VAE."""
    fail_on_prompt: str | None = None
    """For tests of the runner: a rollout whose prompt contains this text raises."""


class MethodConfig(BaseModel):
    """One method setting: `method` names the ContextPolicy, the other keys are that policy's settings.

    The settings are checked against the policy's own `Settings` dataclass when the file is loaded.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str
    """Registered name (base, infinity_rope, deep_forcing, rag) or ``package.module:Policy``."""

    @property
    def settings(self) -> dict[str, Any]:
        """The policy's settings as given."""
        return dict(self.model_extra or {})


class EngineSection(Section):
    """How the work is spread. Free to change between starts of the same run."""

    address: str | None = None
    """Ray address; None uses a running cluster if there is one (RAY_ADDRESS), else starts a local one."""
    actors: int = Field(default=1, ge=1)
    """Rollout actors."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that Ray reserves per actor."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that Ray reserves per actor; 0 runs on the CPU."""
    threads_per_actor: int = Field(default=1, ge=1)
    """Torch threads per actor; fixed, because sums change with the thread count."""
    max_attempts: int = Field(default=3, ge=1)
    """Counted attempts before a rollout is quarantined."""
    checkpoint_every_blocks: int = Field(default=8, ge=1)
    """Blocks per latent part."""


class VideoSection(Section):
    """Pixels."""

    enabled: bool = True
    """Decode and store an H.264 file per horizon."""
    crf: int = Field(default=18, ge=0, le=51)
    """x264 quality; lower is better."""
    fps: int = Field(default=16, ge=1)
    """Frames per second."""


class ScoringSection(Section):
    """Which scores are computed after (and while) videos are made."""

    suite: Literal["preview", "none"] = "preview"
    """preview: training-free measures, not VBench. none: no scoring."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs that each scoring worker reserves."""


class RunConfig(Section):
    """A whole run."""

    job: Literal["evaluate"] = "evaluate"
    """What this file describes."""
    run: RunSection
    """Address and seed."""
    prompts: PromptsSection
    """Prompts."""
    durations_s: list[float] = Field(min_length=1)
    """Video lengths in seconds; latent frames = round(duration * 16 / 4), rounded up to whole blocks."""
    independent_durations: bool = False
    """Make each duration a rollout of its own instead of prefixes of the longest."""
    backbones: dict[Name, BackboneConfig] = Field(min_length=1)
    """Generators by name."""
    methods: dict[Name, MethodConfig] = Field(min_length=1)
    """Method settings by name."""
    engine: EngineSection = EngineSection()
    """Actors and attempts."""
    video: VideoSection = VideoSection()
    """Video files."""
    scoring: ScoringSection = ScoringSection()
    """Scores."""

    @field_validator("durations_s")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        for duration in value:
            if not 0 < duration <= 3600:
                raise ValueError(f"duration {duration} s must be above 0 and at most 3600")
        if len(set(value)) != len(value):
            raise ValueError(f"durations {value} hold a duplicate")
        return sorted(value)

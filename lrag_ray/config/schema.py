"""The run configuration as typed models. Every field is documented; unknown keys are refused.

A loaded `RunConfig` is complete: presets are merged in, so nothing else needs to know of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from lrag_ray.config.bank import BankSection
from lrag_ray.config.lora import LoraConfig
from lrag_ray.config.problems import described
from lrag_ray.config.redaction import RAY_ADDRESS_FORM, holds_credentials, is_ray_address
from lrag_ray.config.refine import RefineSection
from lrag_ray.config.section import CREDENTIALS, Address, Section
from lrag_ray.config.vae import VaeConfig
from lrag_ray.config.watch import WatchSection
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.scoring.registry import check_name
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, DimensionName, Mode
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.kernels import AttentionChoice, Kernels, Products

# Far above anything that is meant: values beyond them are slips, and would fail late or never.
MOST_PROMPTS = 1_000_000
"""Prompts of a run."""
MOST_SAMPLES = 10_000
"""Samples per prompt."""
MOST_ROLLOUTS = 10_000_000
"""Rollouts of a run."""
MOST_CELLS = 5_000
"""Backbones times methods times durations of a run: the rows of its tables."""
MOST_WORKERS = 100_000
"""Actors or scoring workers at a time."""
_MOST_CPUS = 4096
_MOST_GPUS = 64
_MOST_LATENT_SIDE = 4096
_HTTP_ADDRESS = r"https?://(\[[0-9A-Fa-f:.]+\]|[^/@?#\s\[\]:]+)(:\d{1,5})?(/[^?#\s]*)?"
_DAY_S = 24 * 3600.0
_WEEK_S = 7 * _DAY_S

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
"""Names become path components: letters, digits, ``_ . -``, not starting with a dot."""


class RunSection(Section):
    """Where the run lives and what seeds it."""

    uri: Address
    """Address of the run directory: a folder or any fsspec address (s3://bucket/run), without credentials."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Run seed of the keyed noise."""


class StorageSection(Section):
    """How the storage of `run.uri` is reached and how long errors are retried. Free to change between starts.

    Credentials never stand here: they come from the environment of every node (AWS_* variables, ~/.aws, roles).
    """

    endpoint_url: str | None = None
    """s3: address of the service (https://host:port); None takes AWS_ENDPOINT_URL, else Amazon's."""
    region: str | None = None
    """s3: region of the bucket; None takes AWS_DEFAULT_REGION."""
    profile: str | None = None
    """s3: profile in ~/.aws of every node; None takes AWS_PROFILE."""
    attempts: int = Field(default=8, ge=1, le=1000)
    """Tries of one operation before its rollout fails, or the run where the driver needs it."""
    retry_for_s: float = Field(default=120, ge=0, le=_WEEK_S)
    """No new attempt begins later than this after the first one."""
    connect_timeout_s: float = Field(default=10, gt=0, le=_DAY_S)
    """s3: longest wait for a connection."""
    read_timeout_s: float = Field(default=60, gt=0, le=_DAY_S)
    """s3: longest silence within an answer."""

    @field_validator("endpoint_url")
    @classmethod
    def _http_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(_HTTP_ADDRESS, value):
            raise ValueError("must be http or https and a host, without credentials, such as http://localhost:9000")
        return value


class PromptsSection(Section):
    """Which prompts."""

    path: Address | None = None
    """UTF-8 text file, one prompt a line (blank lines are skipped but keep their line number); or a table (.csv, .tsv,
    .json, .jsonl) with a column of prompts, whose other columns are kept in run.json."""
    column: str = Field(default="prompt", min_length=1)
    """Column or field of a table that holds the prompt."""
    limit: int | None = Field(default=None, ge=1, le=MOST_PROMPTS)
    """Use only the first n prompts."""
    count: int | None = Field(default=None, ge=1, le=MOST_PROMPTS)
    """Number of prompts to plan for while the file is not there yet; ignored by `run`."""
    samples: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    """Independent samples per prompt."""
    refine: RefineSection | None = None
    """Rewrite every prompt by a language model first; null: take prompts as they are."""

    @model_validator(mode="after")
    def _named(self) -> PromptsSection:
        if self.path is None and self.count is None:
            raise ValueError("give path (a file with one prompt a line), or count to plan without a file")
        return self


class LatentShape(Section):
    """Shape of one latent frame."""

    channels: int = Field(default=16, ge=1, le=1024)
    """Latent channels."""
    height: int = Field(default=60, ge=2, le=_MOST_LATENT_SIDE)
    """Latent rows; pixels / 8, with the tiny world's VAE pixels / 16."""
    width: int = Field(default=104, ge=2, le=_MOST_LATENT_SIDE)
    """Latent columns; pixels / 8, with the tiny world's VAE pixels / 16."""


class WeightsConfig(Section):
    """Where the transformer's weights come from: a checkpoint, the package itself, or a random recipe."""

    path: Address | None = None
    """Checkpoint file (.pt or .safetensors), or a Diffusers ``transformer`` folder."""
    use_ema: bool = False
    """Take ``generator_ema`` instead of ``generator``."""
    lora: LoraConfig | None = None
    """LoRA merged at load."""
    random_seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    """Build random weights from this seed instead of reading a checkpoint."""
    builtin: Literal["tiny_world", "tiny_world_zero_shot"] | None = None
    """Weights that come with the package: the tiny world's generator, trained with retrieved frames in its contexts,
    and the one that was trained without."""

    @model_validator(mode="after")
    def _one_source(self) -> WeightsConfig:
        if [self.path, self.random_seed, self.builtin].count(None) != 2:
            raise ValueError(
                "give exactly one of path (a checkpoint), random_seed (a random recipe) and builtin (weights that come "
                "with the package)"
            )
        return self


class TextEncoderConfig(Section):
    """The text encoder; `tiny` is a random two-layer UMT5 over bytes."""

    kind: Literal["tiny", "umt5"] = "umt5"
    """Which encoder."""
    path: Address | None = None
    """umt5: checkpoint file or Diffusers folder."""
    tokenizer: Address | None = None
    """umt5: folder with the tokenizer files."""

    @model_validator(mode="after")
    def _located(self) -> TextEncoderConfig:
        if self.kind == "umt5" and (self.path is None or self.tokenizer is None):
            raise ValueError("kind umt5 needs path (the checkpoint) and tokenizer (the folder with its files)")
        return self


class BackboneConfig(Section):
    """One frozen generator with its text encoder and VAE."""

    preset: str | None = None
    """Preset whose values are the defaults of this section: tiny_world (trained, for prompts of the tiny world),
    tiny_world_zero_shot, tiny (untrained), self_forcing, causal_forcing (the 5 s checkpoint, as the paper used it),
    causal_forcing_long (its authors' checkpoint for long video), causal_forcing_framewise, causal_forcing_2step,
    causal_forcing_1step (blocks of one frame) or longlive."""
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
    products: Products = "exact"
    """Matrix products of the layers: exact, in `dtype`; fp8, of 8-bit floats with a scale per token and output channel
    (on a GPU: bfloat16, compute capability 8.9). Part of the rollout's identity; `lrag-ray bench rollout --products
    fp8` shows what it changes. No GPU has run it yet."""
    text_encoder: TextEncoderConfig
    """Text encoder."""
    vae: VaeConfig
    """Video VAE."""
    fail_on_prompt: str | None = None
    """For tests of the runner: a rollout whose prompt contains this text raises."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> BackboneConfig:
        channels = self.latent.channels
        if (self.transformer.in_dim, self.transformer.out_dim) != (channels, channels):
            raise ValueError(
                f"latent.channels {channels} must equal transformer.in_dim {self.transformer.in_dim} and "
                f"transformer.out_dim {self.transformer.out_dim}"
            )
        self.transformer.token_grid(self.latent.height, self.latent.width)
        return self


class MethodConfig(BaseModel):
    """One method setting: `method` names the ContextPolicy, the other keys are that policy's settings.

    The settings are checked against the policy's own `Settings` dataclass when the file is loaded.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str
    """Registered name (`lrag-ray methods` lists them) or ``package.module:Policy``; may be left out where the setting
    itself is called like a registered method."""
    preset: Literal["released"] | None = None
    """released: the settings of the method's own release as defaults, whatever budget they spend. None: the equal
    budget of 12 latent frames."""
    history: BankType = "exact"
    """How a method that keeps a history (rag) stores its keys and values: exact, in the backbone's precision; bf16;
    int8, int4: half and a quarter of bfloat16; int8_hadamard, int4_hadamard: keys are rotated first. Part of the
    rollout's identity; `lrag-ray verify --bank` and `bench rollout` show what it changes."""

    @model_validator(mode="after")
    def _no_credentials(self) -> MethodConfig:
        for key, value in self.settings.items():
            if isinstance(value, str) and holds_credentials(value):
                raise ValueError(f"{key} holds {CREDENTIALS}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The policy's settings as given."""
        return dict(self.model_extra or {})


class ActorRange(Section):
    """As many actors as the cluster has room for, within bounds."""

    min: int
    """Actors that are asked for always; those without room are the demand that makes a cluster scale up."""
    max: int
    """Most actors."""


def _actors(value: Any) -> Any:
    if isinstance(value, bool) or not (isinstance(value, int | dict | ActorRange) or value == "per_gpu"):
        raise ValueError(f"expected a whole number, per_gpu or {{min: a, max: b}}, got {described(value)}")
    if isinstance(value, dict):
        if set(value) != {"min", "max"} or not all(type(bound) is int for bound in value.values()):
            raise ValueError("expected {min: a, max: b} with two whole numbers")
        if not 1 <= value["min"] <= value["max"]:
            raise ValueError(f"min {value['min']} must be at least 1 and at most max {value['max']}")
        if value["max"] > MOST_WORKERS:
            raise ValueError(f"max must be at most {MOST_WORKERS}, got {value['max']}")
    elif isinstance(value, int) and value < 1:
        raise ValueError(f"must be at least 1, got {value}")
    elif isinstance(value, int) and value > MOST_WORKERS:
        raise ValueError(f"must be at most {MOST_WORKERS}, got {value}")
    return value


class WorkersSection(Section):
    """How the work is spread. Free to change between starts of the same run."""

    address: str | None = None
    """Ray address (host:port, auto or local); None uses that in RAY_ADDRESS, else starts a local cluster."""
    actors: Annotated[ActorRange | int | Literal["per_gpu"], BeforeValidator(_actors)] = 1
    """Rollout actors: a number that is asked for always; per_gpu, as many as the GPUs of the cluster have room for; or
    {min: a, max: b}, at least a and up to b as nodes have room. The last two follow nodes that join and leave."""
    cpus_per_actor: float = Field(default=1, gt=0, le=_MOST_CPUS)
    """CPUs that Ray reserves per actor."""
    gpus_per_actor: float = Field(default=0, ge=0, le=_MOST_GPUS)
    """GPUs that Ray reserves per actor; 0 runs on the CPU."""
    threads_per_actor: int = Field(default=1, ge=1, le=_MOST_CPUS)
    """Torch threads per actor; fixed, because sums change with the thread count."""
    max_attempts: int = Field(default=3, ge=1, le=1000)
    """Counted attempts before a rollout is quarantined."""
    stall_timeout_s: float | None = Field(default=1800, gt=0, le=_WEEK_S)
    """An actor that finishes no block (or other step, such as loading) in this time is replaced; null: never."""
    lease_ttl_s: float = Field(default=120, ge=1, le=3600)
    """A driver that showed no sign of life on storage for this long is presumed dead: it stops itself, and the next one
    takes the run over. It shows twelve of them in that time."""

    @field_validator("address")
    @classmethod
    def _no_user_info(cls, value: str | None) -> str | None:
        # Ray Client's addresses are refused where the cluster is reached, with the way out.
        if value is not None and not is_ray_address(value.removeprefix("ray://")):
            raise ValueError(f"must be {RAY_ADDRESS_FORM}, without credentials: tokens belong in RAY_AUTH_TOKEN")
        return value

    @property
    def least_actors(self) -> int:
        """Actors that are asked for whether or not there is room."""
        if isinstance(self.actors, ActorRange):
            return self.actors.min
        return 1 if self.actors == "per_gpu" else self.actors

    @property
    def most_actors(self) -> int | None:
        """Most actors at a time, or None where only the cluster's room limits them."""
        if isinstance(self.actors, ActorRange):
            return self.actors.max
        return None if self.actors == "per_gpu" else self.actors

    @model_validator(mode="after")
    def _gpus_fit(self) -> WorkersSection:
        if self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ValueError(f"gpus_per_actor {self.gpus_per_actor:g}: a share above 1 must be a whole number of GPUs")
        if self.actors == "per_gpu" and self.gpus_per_actor == 0:
            raise ValueError("actors: per_gpu needs gpus_per_actor above 0; on CPUs use a number or {min: a, max: b}")
        return self


class EngineSection(WorkersSection):
    """How the work is spread. Free to change between starts of the same run."""

    attention: AttentionChoice = "auto"
    """Kernel of the generator's attention. auto takes the first of flash, efficient and math that fits the device,
    precision and head size. cudnn compiles for each new shape, so contexts of many shapes take flash beside it.
    Parts made by another kernel are those of another device kind (`resume.on`)."""
    fused_rows: bool = True
    """On a GPU, do query/key norm, rotation and the write into the context in one Triton kernel. Switched on or off, it
    makes another device kind (`resume.on`): values may differ in the last bit."""
    fused_layers: bool = False
    """On a GPU, do gated residual, norm and modulation in one Triton kernel, and GELU where its product ends. Makes
    another device kind, as `fused_rows` does. Off: no GPU has run it yet."""
    prompts_per_pass: int = Field(default=1, ge=1, le=16)
    """Rollouts of one backbone, method and length that an actor makes together, as rows of the same passes; each keeps
    its own parts, commits and attempts. A pass is always full, a lone rollout repeats itself in it, so bits
    do not depend on company; but another number makes another device kind (`resume.on`)."""
    checkpoint_every_blocks: int = Field(default=8, ge=1, le=100_000)
    """Blocks per latent part."""
    bank: BankSection = BankSection()
    """Where histories are kept."""

    @property
    def kernels(self) -> Kernels:
        """What a generator is loaded with."""
        return Kernels(self.attention, self.fused_rows, self.fused_layers)


class ResumeSection(Section):
    """What a rollout that was begun before is continued from. Free to change between starts of the same run."""

    on: Literal["same_device_kind", "any"] = "same_device_kind"
    """Parts to continue from: those that the same kind of device made (then the rollout equals an undisturbed one, bit
    for bit), or those of any (another GPU rounds differently)."""


class VideoSection(Section):
    """Pixels."""

    enabled: bool = True
    """Decode and store an H.264 file per horizon."""
    crf: int = Field(default=18, ge=0, le=51)
    """x264 quality; lower is better."""
    fps: int = Field(default=16, ge=1, le=1000)
    """Frames per second."""
    cold_chunk: int | None = Field(default=None, ge=1, le=100_000)
    """Reset the decoder's cache every n latent frames, as the released code does (60): each chunk begins
    with one video frame instead of four, with a visible seam. None decodes without seams."""


class ScoringSection(Section):
    """Which scores are computed after (and while) videos are made. Free to change between starts of the same run."""

    suite: Annotated[str, AfterValidator(check_name)] = "preview"
    """preview: training-free measures, not VBench. vbench_long: the six dimensions of VBench-Long. none: no scoring.
    world: rides of the tiny world alone, by turn. ``package.module:Suite``: a suite of your own."""
    settings: dict[str, Any] = Field(default={})
    """Settings of a suite of your own, checked against its ``Settings``."""
    mode: Mode = "direct"
    """vbench_long: direct cuts clips from the decoded frames, compat re-encodes them as the official splitter does.
    Each has its own folder and tables; only compat is comparable with published numbers."""
    dimensions: list[DimensionName] = Field(default=list(DIMENSION_NAMES), min_length=1)
    """vbench_long: which dimensions; those added later are scored in addition."""
    weights: Address | None = None
    """vbench_long: folder with the networks' official files, laid out as VBench's own cache; None looks into the caches
    of VBench and torch. ``random`` draws untrained weights, for tests: the numbers then mean nothing."""
    precision: Literal["official", "float32"] = "official"
    """vbench_long: official computes as the official code does on that device, float32 everywhere in float32."""
    early_stop: bool = True
    """vbench_long: end dynamic_degree of a clip once its decision is certain; the score is the same."""
    batch_frames: int | None = Field(default=None, ge=1, le=100_000)
    """vbench_long: frames per batch of the vision transformers and MUSIQ; None takes 32 on a GPU and 8 on a CPU, whose
    caches hold no more. Results do not depend on it."""
    batch_pairs: int | None = Field(default=None, ge=1, le=100_000)
    """vbench_long: frame pairs per batch of RAFT and AMT-S; None takes 4 on a GPU and 1 on a CPU. Results do not depend
    on it."""
    controls: list[Literal["frozen"]] = Field(default=[])
    """vbench_long: frozen also scores the first frame of each prompt's first method, held for the whole video. It shows
    how far a dimension rewards stillness; it is shown next to the ranks and never ranked."""
    workers: int | None = Field(default=None, ge=1, le=MOST_WORKERS)
    """Scoring workers; None takes as many as fit the cluster when a wave begins."""
    cpus_per_worker: float = Field(default=1, gt=0, le=_MOST_CPUS)
    """CPUs that each scoring worker reserves; of vbench_long also its torch threads, rounded down."""
    gpus_per_worker: float = Field(default=0, ge=0, le=_MOST_GPUS)
    """GPUs, or a share of one, that each worker of a suite with networks (vbench_long) reserves; 0 scores on CPUs."""
    during_generation: bool = True
    """Score what is committed while rollouts go on, on CPUs and GPUs that no rollout holds; what is left is scored at
    the end."""

    @field_validator("settings")
    @classmethod
    def _no_credentials(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, setting in value.items():
            if any(map(holds_credentials, _texts(setting))):
                raise ValueError(f"{key} holds {CREDENTIALS}")
        return value

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value % 1:
            raise ValueError(f"a share above 1 must be a whole number of GPUs, not {value:g}")
        return value

    @field_validator("dimensions", "controls")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError(f"{value} holds a duplicate")
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


class RunConfig(Section):
    """A whole run."""

    job: Literal["evaluate"] = "evaluate"
    """What this file describes."""
    preset: Literal["as_released"] | None = None
    """as_released: the numerics and decoding of the paper's own runs as defaults: bfloat16 descriptors and VAE, and
    cold decode chunks of 60 latent frames."""
    run: RunSection
    """Address and seed."""
    storage: StorageSection = StorageSection()
    """How the address is reached."""
    prompts: PromptsSection
    """Prompts."""
    durations_s: list[float] = Field(min_length=1, max_length=100)
    """Video lengths in seconds; latent frames = round(duration * 16 / 4), rounded up to whole blocks."""
    independent_durations: bool = False
    """Make each duration a rollout of its own instead of prefixes of the longest."""
    backbones: dict[Name, BackboneConfig] = Field(min_length=1)
    """Generators by name."""
    methods: dict[Name, MethodConfig] = Field(min_length=1)
    """Method settings by name."""
    engine: EngineSection = EngineSection()
    """Actors and attempts."""
    resume: ResumeSection = ResumeSection()
    """Continuing of rollouts."""
    video: VideoSection = VideoSection()
    """Video files."""
    scoring: ScoringSection = ScoringSection()
    """Scores."""
    watch: WatchSection = WatchSection()
    """Metrics, loggers and what happens at the end."""

    def decoded(self, rollouts: int) -> int:
        """How many of the first `rollouts`, prompt by prompt, get a video."""
        return rollouts if self.video.enabled else 0

    @field_validator("durations_s")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        for duration in value:
            if not 0 < duration <= 3600:
                raise ValueError(f"duration {duration} s must be above 0 and at most 3600")
        if len(set(value)) != len(value):
            raise ValueError(f"durations {value} hold a duplicate")
        return sorted(value)

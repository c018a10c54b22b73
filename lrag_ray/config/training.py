"""The configuration of an encoder training: ``job: train_encoder``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lrag_ray.config.schema import RunSection, StorageSection, WorkersSection
from lrag_ray.config.section import Address, Section
from lrag_ray.config.watch import WatchSection

LossPreset = Literal["full", "ae_seq_delta", "ae_only", "as_released"]
LOSS_PRESETS: dict[str, dict[str, float]] = {
    "full": {"delta_weight": 1.0, "smooth_weight": 1.0},
    "ae_seq_delta": {"delta_weight": 1.0, "smooth_weight": 0.0},
    "ae_only": {"delta_weight": 0.0, "smooth_weight": 0.0},
    "as_released": {"delta_weight": 0.0, "smooth_weight": 1.0},
}
"""Weights of the losses by preset: the rows of the paper's ablation, and the released base configuration."""


class TrainingDataSection(Section):
    """Which latents the encoder is trained on."""

    uris: list[Address] = Field(min_length=1, max_length=1000)
    """Addresses of runs or imported datasets with latents of one shape; several are joined."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rollouts in the validation split. The split follows from each rollout's own digest, so no rollout
    moves when the dataset grows; of few rollouts the share is rough. 0 trains on all, and the best checkpoint is then
    that of the lowest training total."""
    window_frames: int = Field(default=8, ge=1, le=10_000)
    """Consecutive latent frames per training sample."""
    short_rollouts: Literal["refuse", "skip"] = "refuse"
    """Rollouts shorter than a window: refuse stops before the training and names them, skip leaves them out and names
    them. They are never padded or repeated."""


class EncoderSection(Section):
    """Sizes of the auto-encoder; the shape of a latent frame is that of the dataset."""

    latent_dim: int = Field(default=1024, ge=1, le=65_536)
    """Width of the embedding."""
    hidden_dims: tuple[int, ...] = Field(default=(64, 128, 256), min_length=1, max_length=16)
    """Channels after each halving of the resolution."""

    @field_validator("hidden_dims")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not all(1 <= width <= 65_536 for width in value):
            raise ValueError(f"{list(value)} must be whole numbers from 1 to 65536")
        return value


class LossSection(Section):
    """Losses of the encoder: reconstruction with weight 1, Window Temporal Delta, smoothness (paper, eq. 6 to 9)."""

    delta_weight: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of the delta loss; null takes that of the preset."""
    delta_margin: float = Field(default=0.85, ge=-1, le=1)
    """Cosine above which neighbouring frames are pushed apart."""
    delta_window: int = Field(default=3, ge=1, le=10_000)
    """Largest distance of frames that the delta loss compares."""
    smooth_weight: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of the smoothness loss; null takes that of the preset."""


class OptimizerSection(Section):
    """AdamW on all parameters at a constant learning rate."""

    lr: float = Field(default=3e-4, gt=0, le=1e3)
    """Learning rate."""
    weight_decay: float = Field(default=1e-4, ge=0, le=1e3)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, ge=0, le=1e6)
    """Largest total gradient norm; 0 does not clip."""


class TrainingSection(Section):
    """Length, batches, checkpoints. `epochs` may grow between starts."""

    epochs: int = Field(default=400, ge=1, le=1_000_000)
    """Passes over the training split, one window per rollout each."""
    batch_size: int = Field(default=128, ge=1, le=1_000_000)
    """Windows per step, over all workers. The last batch of an epoch takes what is left; a split smaller than a batch
    makes one smaller batch per epoch. Nothing is dropped or repeated."""
    amp: bool = True
    """float16 with a gradient scaler on GPUs; CPUs always compute in float32."""
    start_from: Address | None = None
    """Checkpoint of ours or of the released trainer whose weights, optimiser and epoch a new training begins with."""


class TrainingEngineSection(WorkersSection):
    """How the training is spread; `actors` are its workers. Free to change between starts of the same training."""

    max_attempts: int = Field(default=8, ge=1, le=1_000_000)
    """Starts of all workers together, after deaths among them, before the training fails. Preempted nodes do not
    count."""
    stall_timeout_s: float | None = Field(default=1800, gt=0, le=7 * 24 * 3600)
    """A worker that waits for the others for longer ends, and all are started again; null: a week."""
    start_timeout_s: float = Field(default=600, gt=0, le=24 * 3600)
    """Longest wait for room for all workers together; then it is asked for again. Elastic workers choose their number
    again after 30 s."""
    resize_every_s: float = Field(default=60, gt=0, le=24 * 3600)
    """With {min: a, max: b}: how often a change of the number of workers is considered."""
    checkpoint_every_steps: int = Field(default=500, ge=1, le=1_000_000)
    """Steps between two checkpoints within an epoch; each epoch ends with one."""
    readers_per_actor: int = Field(default=4, ge=1, le=256)
    """Threads of each worker that read windows ahead."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> TrainingEngineSection:
        if self.gpus_per_actor not in (0, 1):
            raise ValueError(f"gpus_per_actor {self.gpus_per_actor:g}: a training worker uses one whole GPU, or 0")
        return self


class TrainEncoderConfig(Section):
    """Training of the retrieval encoder."""

    job: Literal["train_encoder"] = "train_encoder"
    """What this file describes."""
    preset: LossPreset = "full"
    """Weights of delta and smoothness: full (1, 1), ae_seq_delta (1, 0) and ae_only (0, 0) are the paper's rows;
    as_released (0, 1) is the released base configuration, which keeps the smoothness loss that the paper's row lacks.
    """
    run: RunSection
    """Address and seed; the seed fixes first weights, order and windows."""
    storage: StorageSection = StorageSection()
    """How addresses are reached, those of the data included."""
    data: TrainingDataSection
    """Latents."""
    encoder: EncoderSection = EncoderSection()
    """Sizes."""
    losses: LossSection = LossSection()
    """Losses."""
    optimizer: OptimizerSection = OptimizerSection()
    """Optimiser."""
    training: TrainingSection = TrainingSection()
    """Epochs and batches."""
    engine: TrainingEngineSection = TrainingEngineSection()
    """Workers and checkpoints."""
    watch: WatchSection = WatchSection()
    """Who else receives the events of a start. Free to change."""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of delta and smoothness, the preset's where none are given."""
        given = {name: getattr(self.losses, name) for name in ("delta_weight", "smooth_weight")}
        return LOSS_PRESETS[self.preset] | {name: value for name, value in given.items() if value is not None}

"""The text stage: every distinct prompt is encoded once, ahead of the rollouts, and its features are stored.

Rollout actors never load the text encoder (umT5-xxl takes 11 GB); they read features. Only the valid rows are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lrag_ray.config.schema import BackboneConfig, WorkersSection
from lrag_ray.errors import ClusterError, ConfigError, LragError, WeightsError
from lrag_ray.stages.backbone import device_for, load_text
from lrag_ray.stages.numerics import make_reproducible
from lrag_ray.stages.spec import Host, Resources, Result, Stage, Task, WorkerState, Yielded
from lrag_ray.store.address import Storage
from lrag_ray.store.embeddings import read_embedding, write_embedding
from lrag_ray.store.records import FailureRecord
from lrag_ray.wan.text import TextEncoder


@dataclass(frozen=True)
class TextTask:
    """A prompt to encode."""

    backbone: str
    """Whose text encoder; backbones with equal encoders share features."""
    text_digest: str
    prompt: str


@dataclass(frozen=True)
class TextStage(Stage[TextTask]):
    """Text features of prompts.

    Needs what a rollout worker needs. Set up: nothing; the encoder is loaded with the first prompt. Does: encodes one
    prompt and stores its features. Returns: `Result`.
    """

    name = "text"
    fatal = (ConfigError, WeightsError)

    storage: Storage
    backbones: Mapping[str, BackboneConfig]
    engine: WorkersSection

    @property
    def resources(self) -> Resources:
        """As the engine section says."""
        return Resources(self.engine.cpus_per_actor, self.engine.gpus_per_actor)

    def open(self, host: Host) -> TextWorker:
        """Never fails."""
        return TextWorker(self, host)

    def progress(self, task: Task[TextTask]) -> int:
        """1 once the features are stored."""
        return int(read_embedding(self.storage, task.payload.text_digest, task.payload.prompt) is not None)

    def ends_with(self, failure: FailureRecord) -> LragError | None:
        """Workers that die or run out of memory do so for every prompt."""
        if failure.kind not in ("death", "out_of_memory"):
            return None
        return ClusterError(f"the prompts cannot be encoded: {failure.reason}. The same command continues")


class TextWorker:
    """Keeps the text encoder that it loaded last."""

    def __init__(self, stage: TextStage, host: Host) -> None:
        self._stage = stage
        self._host = host
        self._digest = ""
        self._encoder: TextEncoder | None = None

    def work(self, payload: TextTask, attempt: str) -> Result | Yielded:
        """Encode a prompt and store its features."""
        if self._host.must_leave():
            return Yielded("its node is about to be taken away")
        make_reproducible(self._stage.engine.threads_per_actor)
        encoder = self._held(payload)
        (rows,) = encoder.encode([payload.prompt])
        write_embedding(self._stage.storage, payload.text_digest, payload.prompt, rows)
        return Result()

    def _held(self, payload: TextTask) -> TextEncoder:
        if self._encoder is None or payload.text_digest != self._digest:
            self._digest, self._encoder = payload.text_digest, None
            self._host.report(WorkerState(payload.text_digest[:12], 0, 1, "loading"))
            self._encoder = load_text(self._stage.backbones[payload.backbone], device_for(self._stage.resources.gpus))
        return self._encoder

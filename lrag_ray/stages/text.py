"""The text stage: every distinct prompt is encoded once, ahead of the rollouts, and its features are stored.

Rollout actors never load the text encoder (umT5-xxl takes 11 GB); they read features. Only the valid rows are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lrag_ray.config.schema import BackboneConfig, EngineSection
from lrag_ray.errors import ClusterError, ConfigError, LragError, WeightsError
from lrag_ray.stages.backbone import device_for, load_text
from lrag_ray.stages.numerics import make_reproducible
from lrag_ray.stages.spec import Host, Resources, Result, Stage, Task, WorkerState, Yielded
from lrag_ray.store.address import Storage
from lrag_ray.store.records import FailureRecord
from lrag_ray.wan.text import TextEncoder

_READ_AT_ONCE = 64
"""Prompts whose features are read side by side to see whether they are whole; each may take 4 MB."""


def embedding_path(text_digest: str, prompt: str) -> str:
    """Where the features of `prompt` are below the run."""
    return f"embeddings/{text_digest[:16]}/{hashlib.sha256(prompt.encode('utf-8')).hexdigest()[:32]}.safetensors"


def read_embedding(storage: Storage, text_digest: str, prompt: str) -> Tensor | None:
    """Features [rows, text_dim] of a prompt, or None where they are missing or damaged."""
    try:
        return _features(storage.read_bytes(embedding_path(text_digest, prompt)))
    except FileNotFoundError:
        return None


def _features(data: bytes) -> Tensor | None:
    try:
        tensors = load_safetensors(data)
    except SafetensorError:
        return None
    rows: Tensor | None = tensors.get("rows")
    checksum: Tensor | None = tensors.get("sha256")
    if rows is None or checksum is None or not torch.equal(_checksum(rows), checksum):
        return None
    return rows


def without_features(storage: Storage, text_digest: str, prompts: Sequence[str]) -> list[str]:
    """Those of `prompts` whose features are missing or damaged."""
    return [prompt for batch in _batches(prompts) for prompt in _missing(storage, text_digest, batch)]


def _batches(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (prompts[first : first + _READ_AT_ONCE] for first in range(0, len(prompts), _READ_AT_ONCE))


def _missing(storage: Storage, text_digest: str, prompts: Sequence[str]) -> list[str]:
    paths = {prompt: embedding_path(text_digest, prompt) for prompt in prompts}
    stored = storage.read_many(list(paths.values()))
    return [prompt for prompt, path in paths.items() if path not in stored or _features(stored[path]) is None]


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
    engine: EngineSection

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
        rows = rows.cpu().contiguous()
        data = save_safetensors({"rows": rows, "sha256": _checksum(rows)})
        self._stage.storage.write(embedding_path(payload.text_digest, payload.prompt), data)
        return Result()

    def _held(self, payload: TextTask) -> TextEncoder:
        if self._encoder is None or payload.text_digest != self._digest:
            self._digest, self._encoder = payload.text_digest, None
            self._host.report(WorkerState(payload.text_digest[:12], 0, 1, "loading"))
            self._encoder = load_text(self._stage.backbones[payload.backbone], device_for(self._stage.resources.gpus))
        return self._encoder


def _checksum(rows: Tensor) -> Tensor:
    digest = hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)

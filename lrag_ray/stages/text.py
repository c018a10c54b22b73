"""The text stage: every distinct prompt is encoded once, ahead of the rollouts, and its features are stored.

Rollout actors never load the text encoder (umT5-xxl takes 11 GB); they read features. Only the valid rows are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lrag_ray.config.schema import BackboneConfig, EngineSection
from lrag_ray.engine.failures import WORKER_LOST, explain
from lrag_ray.errors import ClusterError, LragError
from lrag_ray.stages.backbone import device_for, load_text
from lrag_ray.store.address import Storage

_RETRIES_AFTER_DEATH = 3
_READ_AT_ONCE = 64
"""Prompts whose features are read side by side to see whether they are whole; each may take 4 MB."""


def embedding_path(text_digest: str, prompt: str) -> str:
    """Where the features of `prompt` lie below the run."""
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


def encode_prompts(
    storage: Storage, backbone: BackboneConfig, text_digest: str, prompts: Sequence[str], engine: EngineSection
) -> None:
    """Encode and store those of `prompts` that are not stored, in a Ray task.

    Death of the worker is retried: encoding is idempotent. Raises the task's own LragError where it had one, and
    ClusterError where its workers die or have too little memory.
    """
    missing = [prompt for batch in _batches(prompts) for prompt in _without_features(storage, text_digest, batch)]
    if not missing:
        return
    task = ray.remote(encode_and_store).options(
        num_cpus=engine.cpus_per_actor, num_gpus=engine.gpus_per_actor, max_retries=_RETRIES_AFTER_DEATH
    )
    try:
        ray.get(task.remote(storage, backbone, text_digest, missing, engine))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LragError):
            raise error.cause from error
        trouble = explain(error)
        if trouble.kind == "out_of_memory":
            raise ClusterError(f"the prompts cannot be encoded: {trouble.reason}") from error
        raise
    except WORKER_LOST as error:
        raise ClusterError(
            f"the prompts cannot be encoded: {_RETRIES_AFTER_DEATH + 1} workers in a row died at it; the last: "
            f"{explain(error).reason}. The same command continues"
        ) from error


def _batches(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (prompts[first : first + _READ_AT_ONCE] for first in range(0, len(prompts), _READ_AT_ONCE))


def _without_features(storage: Storage, text_digest: str, prompts: Sequence[str]) -> list[str]:
    paths = {prompt: embedding_path(text_digest, prompt) for prompt in prompts}
    stored = storage.read_many(list(paths.values()))
    return [prompt for prompt, path in paths.items() if path not in stored or _features(stored[path]) is None]


def encode_and_store(
    storage: Storage, backbone: BackboneConfig, text_digest: str, prompts: Sequence[str], engine: EngineSection
) -> None:
    """Encode `prompts` and store their features."""
    torch.set_num_threads(engine.threads_per_actor)
    encoder = load_text(backbone, device_for(engine.gpus_per_actor))
    for prompt in prompts:
        (rows,) = encoder.encode([prompt])
        rows = rows.cpu().contiguous()
        data = save_safetensors({"rows": rows, "sha256": _checksum(rows)})
        storage.write(embedding_path(text_digest, prompt), data)


def _checksum(rows: Tensor) -> Tensor:
    digest = hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)

"""Text features of prompts below a run: encoded once, read by every rollout of the prompt.

::

    RUN/embeddings/<text encoder>/<prompt>.safetensors    `rows` [rows, text_dim] and a checksum of them and the path
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lrag_ray.store.address import Storage
from lrag_ray.wan.tensor_file import NotTensorsError, tensors_in

FOLDER = "embeddings"
_READ_AT_ONCE = 64
"""Prompts whose features are read side by side to see whether they are whole; each may take 4 MB."""


def embedding_path(text_digest: str, prompt: str) -> str:
    """Where the features of `prompt` are below the run."""
    return f"{FOLDER}/{text_digest[:16]}/{hashlib.sha256(prompt.encode('utf-8')).hexdigest()[:32]}.safetensors"


def write_embedding(storage: Storage, text_digest: str, prompt: str, rows: Tensor) -> None:
    """Store the features [rows, text_dim] of a prompt."""
    path = embedding_path(text_digest, prompt)
    rows = rows.cpu().contiguous()
    storage.write(path, save_safetensors({"rows": rows, "sha256": _checksum(rows, path)}))


def read_embedding(storage: Storage, text_digest: str, prompt: str) -> Tensor | None:
    """Features [rows, text_dim] of a prompt, or None where they are missing or damaged."""
    path = embedding_path(text_digest, prompt)
    try:
        return features_in(storage.read_bytes(path), path)
    except FileNotFoundError:
        return None


def features_in(data: bytes, path: str) -> Tensor | None:
    """The features in the file at `path`, or None where they are damaged or another prompt's."""
    try:
        tensors = tensors_in(data)
    except NotTensorsError:
        return None
    rows: Tensor | None = tensors.get("rows")
    checksum: Tensor | None = tensors.get("sha256")
    if rows is None or rows.dim() != 2 or not rows.is_floating_point():
        return None
    if checksum is None or checksum.dtype != torch.uint8:
        return None
    # Features of earlier versions have a checksum of their values alone.
    found = (_checksum(rows, path), _checksum(rows, None))
    return rows if any(torch.equal(each, checksum) for each in found) else None


def without_features(storage: Storage, text_digest: str, prompts: Sequence[str]) -> list[str]:
    """Those of `prompts` whose features are missing or damaged."""
    return [prompt for batch in _batches(prompts) for prompt in _missing(storage, text_digest, batch)]


def _batches(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (prompts[first : first + _READ_AT_ONCE] for first in range(0, len(prompts), _READ_AT_ONCE))


def _missing(storage: Storage, text_digest: str, prompts: Sequence[str]) -> list[str]:
    paths = {prompt: embedding_path(text_digest, prompt) for prompt in prompts}
    stored = storage.read_many(list(paths.values()))
    return [prompt for prompt, path in paths.items() if path not in stored or features_in(stored[path], path) is None]


def _checksum(rows: Tensor, path: str | None) -> Tensor:
    digest = hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes())
    if path is not None:
        digest.update(f"{rows.dtype} {list(rows.shape)} {path}".encode())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

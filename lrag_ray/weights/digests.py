"""Digests of weights, remembered per machine: a 5.7 GB checkpoint is hashed once, not at every start."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lrag_ray.errors import WeightsError
from lrag_ray.store.create_only import write_atomic
from lrag_ray.weights.local import file_digest, is_remote, local_copy, record_at

_MOST_BYTES = 1 << 38
"""Of a file of weights; a sparse one of a terabyte takes no disk, and an hour to read."""


def weights_digest(address: str) -> str:
    """SHA-256 of a file, or over names and digests of the files of a folder, wherever it lies.

    What is in a bucket is not fetched where its pull recorded the digests. Raises WeightsError if there is nothing.
    """
    record = record_at(address) if is_remote(address) else None
    if record is not None:
        digests = {name: file.sha256 for name, file in record.files.items()}
        name = address.rstrip("/").rsplit("/", 1)[-1]
        return digests[name] if list(digests) == [name] else _folder_digest(digests)
    path = local_copy(address)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
        return _folder_digest({file.relative_to(path).as_posix(): _file_digest(file) for file in files})
    return _file_digest(path)


def _folder_digest(digests: dict[str, str]) -> str:
    named = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(named.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        stat = path.stat()
        if not path.is_file():
            # Reading a pipe would wait for its writer for ever, and a device may have no end.
            raise WeightsError(f"{path} is not a regular file. Fix: correct the path in the configuration")
        if stat.st_size > _MOST_BYTES:
            raise WeightsError(
                f"{path} has {stat.st_size:,} bytes, more than any network that runs here. Fix: correct the path in "
                "the configuration"
            )
        key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        known = _remembered()
        if key not in known:
            known[key] = file_digest(path)
            _remember(known)
        return known[key]
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {error.strerror}. Fix: correct the path in the configuration"
        ) from error


def _memory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lrag-ray" / "digests.json"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, str]) -> None:
    from fsspec.implementations.local import LocalFileSystem

    try:
        write_atomic(LocalFileSystem(), str(_memory()), json.dumps(known).encode())
    except OSError:
        # A read-only home costs time at the next start, nothing else.
        return

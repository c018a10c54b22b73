"""Digests of weight files, remembered per machine: a 5.7 GB checkpoint is hashed once, not at every start."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lrag_ray.errors import WeightsError
from lrag_ray.store.create_only import write_atomic


def path_digest(path: str | Path) -> str:
    """SHA-256 of a file, or over names and digests of the files of a folder; WeightsError if it is not there."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        named = "".join(f"{file.relative_to(path).as_posix()}\0{path_digest(file)}\n" for file in files)
        return hashlib.sha256(named.encode()).hexdigest()
    try:
        stat = path.stat()
        key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
        known = _remembered()
        if key not in known:
            with path.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            _remember(known)
        return known[key]
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read: {error.strerror}. Mend: correct the path in the configuration"
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

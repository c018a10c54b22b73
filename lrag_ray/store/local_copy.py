"""A stored video as a local file, fetched once and checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lrag_ray.store.address import Storage
from lrag_ray.video.mp4 import VideoError


def local_copy(storage: Storage, path: str, sha256: str | None, scratch: Path) -> Path:
    """`path` of `storage` as a file of this machine; in the folder `scratch` unless it is one already.

    Raises:
        VideoError: it is missing, or has other bytes than `sha256`, where given, says.
    """
    if storage.is_local:
        local = Path(storage.full(path))
        if not local.is_file():
            raise VideoError(f"{path} is missing")
    else:
        local = scratch / f"video{Path(path).suffix}"
        try:
            storage.get_file(path, local)
        except FileNotFoundError:
            raise VideoError(f"{path} is missing") from None
    if sha256 is not None and sha256_of(local) != sha256:
        raise VideoError(f"{path} does not have the checksum of its commit")
    return local


def sha256_of(path: Path) -> str:
    """Checksum of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

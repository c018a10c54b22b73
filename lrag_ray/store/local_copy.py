"""A stored video as a local file, fetched once and checked."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lrag_ray.store.address import Storage
from lrag_ray.store.records import HOW_TO_REPAIR
from lrag_ray.video.mp4 import VideoError


class DamagedVideoError(VideoError):
    """The stored file is not the one that was committed: damage of the store or on the way, no fault of the video."""


def local_copy(storage: Storage, path: str, sha256: str | None, scratch: Path) -> Path:
    """`path` of `storage` as a file of this machine; in the folder `scratch` unless it is one already.

    Raises:
        DamagedVideoError: it is missing, or has other bytes than `sha256`, where given, says.
    """
    if storage.is_local:
        local = Path(storage.full(path))
        if not local.is_file():
            raise DamagedVideoError(f"{path} is missing. {HOW_TO_REPAIR}")
    else:
        local = scratch / f"video{Path(path).suffix}"
        try:
            storage.get_file(path, local)
        except FileNotFoundError:
            raise DamagedVideoError(f"{path} is missing. {HOW_TO_REPAIR}") from None
    if sha256 is not None and sha256_of(local) != sha256:
        raise DamagedVideoError(f"{path} does not have the checksum of its commit. {HOW_TO_REPAIR}")
    return local


def sha256_of(path: Path) -> str:
    """Checksum of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The runs below a folder or bucket prefix."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from lrag_ray.store.address import Storage
from lrag_ray.store.run_dir import RUN_FILE

_DEPTH = 3
"""Folders below the one that is named where runs are looked for."""


def runs_below(uri: str) -> Iterator[str]:
    """Addresses of the run directories at `uri` and up to three folders below it, in order.

    What is inside a run is not looked at. Raises StorageError for an address that cannot be read.
    """
    yield from _below(Storage(uri), "", _DEPTH)


def _below(storage: Storage, path: str, depth: int) -> Iterator[str]:
    try:
        storage.read_bytes(posixpath.join(path, RUN_FILE))
    except FileNotFoundError:
        if depth:
            for folder in storage.folders(path):
                yield from _below(storage, folder, depth - 1)
    else:
        yield f"{storage.uri}/{path}".rstrip("/")

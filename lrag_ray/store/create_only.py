"""The two ways anything is written to a run: once only, or atomically for readers.

A commit is created once: locally a temporary file is hard-linked to its final name, on object stores the put
carries If-None-Match. Everything else is written to a temporary and renamed, or in a single put.
``with fs.open(..., "wb")`` is never used on an object store, because an exception inside the block publishes the
truncated object.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lrag_ray.errors import StorageError
from lrag_ray.store.faults import already_exists, is_beyond_end
from lrag_ray.store.inside import opened_file

TEMPORARY_PREFIX = ".tmp-"
"""File names that start so are unfinished writes and never listed."""
_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".tex": "text/plain; charset=utf-8",
    ".webp": "image/webp",
}
"""Of what a reader opens from a bucket, by suffix; the same on every machine."""


def create_once(fs: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write `data` to `path` unless another file is there; True if `path` now holds what this call was to create.

    Atomic on local and POSIX file systems and on stores that honour If-None-Match (see `Storage.probe`). Readers
    see the whole file or none. A file with the very same bytes counts as this call's own: its first try may have
    succeeded and only the answer been lost, and botocore, aiohttp and NFS clients repeat such a write by themselves.
    """
    try:
        if isinstance(fs, LocalFileSystem):
            with _temporary(Path(path)) as temporary:
                _write(temporary, data)
                os.link(temporary, path)
        else:
            fs.pipe_file(path, data, mode="create")
    except Exception as error:
        if not already_exists(error):
            raise
        return _holds(fs, path, data)
    return True


def _holds(fs: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Whether `path` has exactly these bytes; no more than one byte too many is read, whatever is stored there."""
    try:
        if not isinstance(fs, LocalFileSystem):
            return cat_range(fs, path, 0, len(data) + 1) == data
        with opened_file(path, None) as file:
            return file.read(len(data) + 1) == data
    except StorageError:
        # A pipe or a device: it is not the file, and reading it may never end.
        return False
    except FileNotFoundError:
        # It was removed since, or the store refuses what it has not: nobody has created it, so nobody was first.
        raise BlockingIOError(errno.EAGAIN, "a create was refused, and nothing is there", path) from None


def cat_range(fs: AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of an object by one request, fewer where it ends before."""
    try:
        return bytes(fs.cat_file(path, start=start, end=end))
    except Exception as error:
        if is_beyond_end(error):
            return b""
        raise


def write_atomic(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Write or replace `path` with `data`, so that a reader sees the old bytes or the new ones."""
    if isinstance(fs, LocalFileSystem):
        with _temporary(Path(path)) as temporary:
            _write(temporary, data)
            temporary.replace(path)
    else:
        fs.pipe_file(path, data, **_shown_as(fs, path))


def _shown_as(fs: AbstractFileSystem, path: str) -> dict[str, str]:
    """What lets a browser show a file of a bucket, which it would save otherwise."""
    content_type = _CONTENT_TYPES.get(PurePosixPath(path).suffix)
    return {"ContentType": content_type} if content_type and "s3" in fs.protocol else {}


def put_atomic(fs: AbstractFileSystem, source: Path, path: str) -> None:
    """Copy the local file `source` to `path` without reading it into memory; atomic for readers."""
    if isinstance(fs, LocalFileSystem):
        with _temporary(Path(path)) as temporary:
            fs.put_file(str(source), str(temporary))
            _sync(temporary)
            temporary.replace(path)
    else:
        fs.put_file(str(source), path)


def rename(source: Path, target: Path) -> None:
    """Rename a local file; fine if an earlier try of the same has done it."""
    try:
        source.replace(target)
    except FileNotFoundError:
        if not target.exists():
            raise


def remove_file(fs: AbstractFileSystem, path: str) -> None:
    """Delete a file; one that is not there is fine, because an earlier try may have deleted it."""
    with suppress(FileNotFoundError):
        fs.rm_file(path)


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name beside `target` for what becomes it; whatever fails, no file of that name is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        # On a disk that fails, the first error is the one to report.
        with suppress(OSError):
            temporary.unlink()


def _write(path: Path, data: bytes) -> None:
    """Write `data` to a new file, on disk before it gets its final name."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

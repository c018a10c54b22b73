"""Local files and folders of a run, opened so that a link that is swapped in meanwhile cannot lead out of it.

A path can change between the check of its links and the opening. So what was opened is asked where it is, and files are
written by way of the opened folder. That needs Linux's ``/proc``; elsewhere only the check before remains.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path

from lrag_ray.errors import StorageError

_DESCRIPTORS = "/proc/self/fd"
_MOST_BYTES = 8 << 30
_MOST_RECORD_BYTES = 256 << 20
"""Of records and tables; a million prompts fit."""


@contextmanager
def opened_file(path: str, root: str | None) -> Iterator[BufferedReader]:
    """A regular file, open for reading, inside `root` where that is given.

    StorageError for paths outside, and for anything but a regular file: reading a pipe would block for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            raise StorageError(f"{path} is not a regular file, so it is not read. Fix: remove it")
        if root is not None:
            _refuse_outside(descriptor, path, root)
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_file(path: str, root: str | None) -> bytes:
    """Content of a regular file, as `opened_file`; StorageError for one larger than any of its kind is.

    A sparse file of any size takes no room on a disk.
    """
    with opened_file(path, root) as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes(path):
            raise StorageError(f"{path} has {size:,} bytes, and at most {most_bytes(path):,} are read. Fix: remove it")
        return file.read()


def most_bytes(path: str) -> int:
    """Bytes that are read of a file with this name, wherever it is stored."""
    return _MOST_RECORD_BYTES if path.endswith((".json", ".jsonl", ".beat", ".parquet")) else _MOST_BYTES


@contextmanager
def opened_folder(path: str, root: str) -> Iterator[str]:
    """A path of the folder `path`, made where it is absent, that stays the same folder whatever becomes of the name."""
    Path(path).mkdir(parents=True, exist_ok=True)
    if not _has_descriptors():
        yield path
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _refuse_outside(descriptor, path, root)
        yield f"{_DESCRIPTORS}/{descriptor}"
    finally:
        os.close(descriptor)


def read_range(path: str, start: int, view: memoryview, *, links: bool = True) -> int:
    """Fill `view` with the bytes of a file from `start` on; returns how many there were.

    OSError for what cannot be read, and, without `links`, for a path that is a link itself.
    """
    done = 0
    # The bare calls: a window of latents is read in one of them, straight into its tensor.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    file = os.open(path, flags)
    try:
        while done < len(view) and (got := os.preadv(file, [view[done:]], start + done)):
            done += got
    finally:
        os.close(file)
    return done


def _refuse_outside(descriptor: int, path: str, root: str) -> None:
    if not _has_descriptors():
        return
    place, real = str(Path(f"{_DESCRIPTORS}/{descriptor}").readlink()), os.path.realpath(root or "/")
    if place != real and not place.startswith(real.rstrip("/") + "/"):
        raise StorageError(outside(path, place))


def outside(path: str, place: str) -> str:
    """What is said of a link that leaves the run."""
    return (
        f"{path} is a symbolic link to {place}, which is not inside the run: it is neither read nor written. Fix: "
        "remove the link, or put in its place what it names"
    )


@cache
def _has_descriptors() -> bool:
    return Path(_DESCRIPTORS).is_dir()

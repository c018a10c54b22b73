"""A run's storage: any fsspec address behind one small set of operations.

Paths are relative to the run's address. Records name paths and come from strangers, so a path that leaves the run is
refused, by its name and by the symbolic links on its way; the address itself may be a link. Errors name the address
without the credentials it may hold.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lrag_ray.config.redaction import redact
from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import StorageError
from lrag_ray.store.create_only import (
    TEMPORARY_PREFIX,
    cat_range,
    create_once,
    put_atomic,
    remove_file,
    rename,
    write_atomic,
)
from lrag_ray.store.faults import error_code, fix_of
from lrag_ray.store.inside import most_bytes, opened_file, opened_folder, outside, read_file, read_range
from lrag_ray.store.retry import GivenUpError, with_retries
from lrag_ray.store.s3 import READERS, client_options
from lrag_ray.store.waits import waiting
from lrag_ray.thread_pool import thread_pool

T = TypeVar("T")

PROBE_PREFIX = "probe-"
"""Files at the top of a run that start so are probes of the address; a program that died may have left one."""

_DESCRIPTOR = re.compile(r"/proc/self/fd/\d+/")
_LEAVES = re.compile(r"^/|\\|\0|(?:^|/)\.\.(?:/|$)")
"""Paths that lead, or could lead, out of the folder that they begin in."""
_SHARE = 256
"""Local files read by one thread in a row: a single one takes less time than handing it over."""


class StorageProbe(NamedTuple):
    """What `Storage.probe` found out about an address that can be written."""

    create_only: bool
    """A second create of the same name is refused, so commits are safe against concurrent writers."""


class FileDetails(NamedTuple):
    """What a listing says about a file."""

    size_bytes: int
    modified_s: float | None
    """Last written, in seconds since 1970 by the store's clock; None where the store does not tell."""


class Storage:
    """Files below one address.

    Every operation is tried again for a while where the error may pass (`options`), and all of them are safe to
    repeat. `follow_links` is for the user's own folders (weights), whose links may lead anywhere. Raises StorageError
    for an address whose scheme is unknown or whose client is not installed, and for what no further try can help. Cheap
    to make, and may be sent to another process, which then opens its own client (clients do not survive a fork).
    """

    def __init__(
        self,
        uri: str,
        options: StorageSection = StorageSection(),  # noqa: B008 - frozen
        follow_links: bool = False,
    ) -> None:
        if mistake := _mistake(uri):
            raise StorageError(f"run.uri {redact(uri)!r} cannot be opened: {mistake}")
        try:
            self.fs, root = fsspec.url_to_fs(_absolute(uri), **(client_options(options) if _is_s3(uri) else {}))
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"run.uri {redact(uri)!r} cannot be opened: {redact(str(error))}. Use a folder, s3://bucket/path, or "
                "another fsspec scheme whose package is installed"
            ) from None
        self.is_s3 = _is_s3(uri)
        if self.is_s3:
            # s3fs would repeat what is repeated here and, below it, by botocore.
            self.fs.retries = 1
        self.root = str(root).rstrip("/")
        self.options = options
        self.follow_links = follow_links
        self._folders_inside: set[str] = set()
        """Folders below a local root that are known to be no links."""
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.uri = redact(self.root if self.is_local else uri.rstrip("/"))
        """The address as it may be shown."""
        self.address = self.root if self.is_local else uri.rstrip("/")
        """The address that another process opens with `options`; it may hold credentials, so it is never shown."""
        self._fence = None if follow_links or not self.is_local else self.root
        """What local files must be inside of."""

    def __reduce__(self) -> tuple[type[Storage], tuple[str, StorageSection, bool]]:
        return Storage, (self.address, self.options, self.follow_links)

    def below(self, path: str) -> Storage:
        """The folder `path` as a storage of its own, reached in the same way."""
        self.full(path)
        return Storage(f"{self.address}/{path}", self.options, self.follow_links)

    def full(self, path: str) -> str:
        """Address of `path` for the fsspec client; refuses a path that leaves the run."""
        full = self._full(path)
        if self._fence is not None:
            self._refuse_links(full)
        return full

    def _full(self, path: str) -> str:
        if _LEAVES.search(path):
            raise StorageError(f"{self.uri}: a record names the path {path!r}, which is not inside the run")
        return f"{self.root}/{path}" if path else self.root

    def _refuse_links(self, full: str) -> None:
        """StorageError where a link between the root and `full` leads out of the run.

        It costs one lstat per file and folder, because a hundred thousand commits are read when a run starts.
        """
        at = full
        while len(at) > len(self.root) and at not in self._folders_inside:
            try:
                mode = os.lstat(at).st_mode
            except OSError:
                mode = 0
            if stat.S_ISLNK(mode):
                real, root = os.path.realpath(at), os.path.realpath(self.root or "/")
                if real != root and not real.startswith(root.rstrip("/") + "/"):
                    raise StorageError(outside(at, real))
            elif stat.S_ISDIR(mode):
                self._folders_inside.add(at)
            at = at.rpartition("/")[0]

    def read_bytes(self, path: str) -> bytes:
        """Content of a file; FileNotFoundError if there is none."""
        full = self.full(path)
        if self.is_local:
            return self._do("read", path, lambda: self._read_local(full))
        # One request for the whole file: no part of a run is so large that pieces of it would be quicker.
        data = self._do("read", path, lambda: cat_range(self.fs, full, 0, most_bytes(path) + 1))
        if len(data) > most_bytes(path):
            raise StorageError(
                f"{self.uri}/{path} has more than {most_bytes(path):,} bytes, which is all that is read. Fix: remove it"
            )
        return data

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file, fewer where it ends before; FileNotFoundError if there is none."""
        data = bytearray(end - start)
        return bytes(memoryview(data)[: self.read_into(path, start, data)])

    def read_into(self, path: str, start: int, buffer: bytearray | memoryview) -> int:
        """Fill `buffer` with the bytes of a file from `start` on; returns how many there were.

        FileNotFoundError if there is no such file.
        """
        full, view = self._full(path), memoryview(buffer)
        if not self.is_local:
            data = self._do("read", path, lambda: cat_range(self.fs, full, start, start + len(view)))
            view[: len(data)] = data
            return len(data)
        # The shortest way for a window in the page cache; anything unusual, links among it, takes the other.
        if self._fence is not None:
            self._refuse_links(full.rpartition("/")[0])
        try:
            return read_range(full, start, view, links=self._fence is None)
        except FileNotFoundError:
            raise
        except OSError:
            return self._do("read", path, lambda: read_range(self.full(path), start, view))

    def read_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        """Contents of files by path, read side by side; a file that vanished meanwhile is left out."""
        shares = [paths[first : first + _SHARE] for first in range(0, len(paths), _SHARE)]
        if len(shares) < 2 and self.is_local:
            return self._read_share(paths)
        if not self.is_local:
            shares = [[path] for path in paths]
        found: dict[str, bytes] = {}
        with thread_pool(READERS, "read") as readers:
            for share in readers.map(self._read_share, shares):
                found.update(share)
        return found

    def _read_share(self, paths: Sequence[str]) -> dict[str, bytes]:
        found = {}
        for path in paths:
            try:
                found[path] = self._read_quickly(path) if self.is_local else self.read_bytes(path)
            except FileNotFoundError:
                continue
        return found

    def sizes(self, paths: Sequence[str]) -> dict[str, int]:
        """Sizes in bytes of files that are asked for by name: a listing may lag behind, this does not."""
        with thread_pool(READERS, "size") as askers:
            found = dict(zip(paths, askers.map(self._size, paths), strict=True))
        return {path: size for path, size in found.items() if size is not None}

    def _size(self, path: str) -> int | None:
        try:
            return int(self._do("read", path, lambda: self.fs.info(self.full(path))["size"]))
        except FileNotFoundError:
            return None

    def _read_quickly(self, path: str) -> bytes:
        """`read_bytes` of a local file; a hundred thousand commits are read when a run starts."""
        try:
            return self._read_local(self.full(path))
        except FileNotFoundError:
            raise
        except OSError:
            return self.read_bytes(path)

    def _read_local(self, full: str) -> bytes:
        return read_file(full, self._fence)

    @contextmanager
    def _writable(self, path: str) -> Iterator[str]:
        """Where to write `path`: by way of its opened folder, so that no link that is swapped in leads elsewhere."""
        full = self.full(path)
        if not self.is_local or self._fence is None:
            yield full
            return
        folder, _, name = full.rpartition("/")
        with opened_folder(folder, self.root) as opened:
            yield f"{opened}/{name}"

    def digest(self, path: str) -> tuple[int, str]:
        """Size in bytes and SHA-256 of a file; FileNotFoundError if there is none."""
        full = self.full(path)
        if not self.is_local:
            data = self.read_bytes(path)
            return len(data), hashlib.sha256(data).hexdigest()

        def read() -> tuple[int, str]:
            with opened_file(full, self._fence) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                return file.tell(), sha256

        return self._do("read", path, read)

    def make_folder(self) -> None:
        """Make the folder of a local address; an object store has none."""
        if self.is_local:
            self._do("make the folder", "", lambda: Path(self.root).mkdir(parents=True, exist_ok=True))

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file that must not exist yet; False if it does, with other content.

        A file that holds exactly `data` counts as created here: the answer to a write that went through may have been
        lost, and what is created once names its writer.
        """

        def create() -> bool:
            with self._writable(path) as place:
                return create_once(self.fs, place, data)

        return self._do("write", path, create)

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file, atomically for readers."""

        def write() -> None:
            with self._writable(path) as place:
                write_atomic(self.fs, place, data)

        self._do("write", path, write)

    def put_file(self, source: Path, path: str) -> None:
        """Upload the local file `source`, atomically for readers."""

        def put() -> None:
            with self._writable(path) as place:
                put_atomic(self.fs, source, place)

        self._do("write", path, put)

    def get_file(self, path: str, target: Path) -> None:
        """Download a file to `target`; FileNotFoundError if there is none."""
        full = self.full(path)
        if not self.is_local:
            self._do("read", path, lambda: self.fs.get_file(full, str(target)))
            return

        def copy() -> None:
            with opened_file(full, self._fence) as file, target.open("wb") as copied:
                shutil.copyfileobj(file, copied)

        self._do("read", path, copy)

    def move(self, source: str, target: str) -> None:
        """Rename a file (copy and delete on object stores)."""
        old, new = self.full(source), self.full(target)
        if self.is_local:

            def move() -> None:
                with self._writable(source) as from_, self._writable(target) as to:
                    rename(Path(from_), Path(to))

            self._do("write", target, move)
        else:
            self._do("write", target, lambda: self.fs.cp_file(old, new))
            self.remove(source)

    def remove(self, path: str) -> None:
        """Delete a file; one that is not there is fine."""
        full = self.full(path)

        def remove() -> None:
            if not self.is_local or Path(full).parent.is_dir():
                with self._writable(path) as place:
                    remove_file(self.fs, place)

        self._do("delete", path, remove)

    def remove_many(self, paths: Sequence[str]) -> None:
        """Delete files, side by side."""
        with thread_pool(READERS, "remove") as removers:
            for _ in removers.map(self.remove, paths):
                pass

    def list_files(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes by path of all files below `prefix`, by one recursive listing, without unfinished writes."""
        return {
            path: found.size_bytes
            for path, found in self.list_details(prefix).items()
            if f"/{TEMPORARY_PREFIX}" not in f"/{path}"
        }

    def list_files_in_shares(self, prefix: str, depth: int) -> dict[str, int]:
        """`list_files`, but one listing per folder `depth` levels below `prefix`, several at a time.

        An object store lists a thousand files per request, one request after the other: of a large run, thousands.
        Files at a lesser depth are left out there. A local folder is listed at once.
        """
        if self.is_local:
            return self.list_files(prefix)
        folders, found = [prefix], dict[str, int]()
        with thread_pool(READERS, "list") as listers:
            for _ in range(depth):
                folders = [folder for below in listers.map(self.folders, folders) for folder in below]
            for share in listers.map(self.list_files, folders):
                found.update(share)
        return found

    def folders(self, prefix: str = "") -> list[str]:
        """Folders directly below `prefix`, in order of their names; links are none."""
        top = self.full(prefix)
        if self.is_local:
            return self._do("list", prefix, lambda: [path[len(self.root) + 1 :] for path in _folders(top)])
        try:
            listed = self._do("list", prefix, lambda: self.fs.ls(top, detail=True))
        except FileNotFoundError:
            return []
        return sorted(str(info["name"])[len(self.root) + 1 :] for info in listed if info["type"] == "directory")

    def list_details(self, prefix: str = "") -> dict[str, FileDetails]:
        """All files below `prefix`, unfinished writes included."""
        top, cut = self.full(prefix), len(self.root) + 1
        if self.is_local:
            return self._do("list", prefix, lambda: {path[cut:]: details for path, details in _walk(top)})
        listed = self._do("list", prefix, lambda: self.fs.find(top, detail=True))
        return {
            path[cut:]: FileDetails(info["size"], _modified(info))
            for path, info in listed.items()
            if path.startswith(self.root)
        }

    def call_s3(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Answer of the S3 API to `method`, for what file systems do not have; only where `is_s3`."""
        answer: dict[str, Any] = self._do(method.replace("_", " "), "", lambda: self.fs.call_s3(method, **parameters))
        return answer

    def probe(self) -> StorageProbe:
        """Write, create twice, read back and remove a small file; StorageError if the address cannot be written."""
        path = f"{PROBE_PREFIX}{secrets.token_hex(8)}"
        self.write(path, b"probe")
        try:
            if self.read_bytes(path) != b"probe":
                raise StorageError(f"{self.uri} does not read back what was written to it")
            return StorageProbe(create_only=not self.create(path, b"again"))
        finally:
            self.remove(path)

    def _do(self, action: str, path: str, operation: Callable[[], T]) -> T:
        """Result of an operation that is safe to repeat; its last error becomes a StorageError with the fix.

        Only reading and listing find that nothing is there: FileNotFoundError then passes as it is.
        """
        try:
            with waiting(f"{action} {self._place(path)}", self.options.retry_for_s) as wait:
                return with_retries(operation, self.options, wait.failed)
        except StorageError:
            raise
        except FileNotFoundError as error:
            code = error_code(error)
            # An empty folder is found out by s3fs itself; a store that answers a listing so means something else.
            if (action == "read" and code != "NoSuchBucket") or (action == "list" and code is None):
                raise
            raise StorageError(self._complaint(action, path, error)) from error
        except GivenUpError as error:
            raise StorageError(self._complaint(action, path, error.last, f" ({error})")) from error.last
        except Exception as error:
            raise StorageError(self._complaint(action, path, error)) from error

    def _place(self, path: str) -> str:
        return f"{self.uri}/{path}" if path else self.uri

    def _complaint(self, action: str, path: str, error: Exception, tries: str = "") -> str:
        # A folder that is open goes by the number of its descriptor, which nobody knows.
        reason = redact(_DESCRIPTOR.sub("", str(error))) or type(error).__name__
        client = getattr(self.fs, "_s3", None)
        fix = fix_of(error, local=self.is_local, endpoint=client.meta.endpoint_url if client else "")
        return (
            f"cannot {action} {self._place(path)}: {error_code(error) or type(error).__name__}: {reason}{tries}. {fix}"
        )


def _is_s3(uri: str) -> bool:
    return uri.startswith(("s3://", "s3a://"))


def _mistake(uri: str) -> str | None:
    """What is wrong with an address that would be understood as another than it looks."""
    if not uri.strip():
        return "it is empty. Name a folder or s3://bucket/path"
    if "::" in uri and "://" not in uri:
        return "fsspec would take what stands behind '::' for an address of its own. Use a name without it"
    if _is_s3(uri) and uri.partition("://")[2].partition("/")[2].startswith("/"):
        return "the key would begin with '/', under which listings find nothing. Remove the second '/' after the bucket"
    return None


def _absolute(uri: str) -> str:
    if "://" in uri:
        return uri
    return os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111 - the folder need not exist


def _folders(folder: str) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _walk(folder: str) -> Iterator[tuple[str, FileDetails]]:
    """Files below `folder`; entries that vanish meanwhile are left out."""
    folders = [folder]
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                    continue
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue
                yield entry.path, FileDetails(found.st_size, found.st_mtime)


def _modified(info: Mapping[str, Any]) -> float | None:
    """When an object was last written, from whatever the client calls it."""
    for key in ("LastModified", "mtime", "updated", "last_modified"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None

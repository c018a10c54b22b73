"""A run's storage: any fsspec address behind one small set of operations.

Paths are relative to the run's address. Records name paths and come from strangers, so a path that leaves the run is
refused. Errors name the address without the credentials it may hold.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lrag_ray.errors import StorageError
from lrag_ray.store.create_only import TEMPORARY_PREFIX, create_once, put_atomic, write_atomic

_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET_PARAMETER = re.compile(
    r"(?i)\b([\w-]*(?:secret|password|passwd|token|signature|credential|api_?key|access_?key)[\w-]*)"
    r"""(["']?\s*[=:]\s*["']?)[^\s"'&,;]+"""
)


def redact(text: str) -> str:
    """`text` without user info in addresses and without values of secret-looking parameters."""
    return _SECRET_PARAMETER.sub(r"\1\2***", _USER_INFO.sub("***@", text))


class Probe(NamedTuple):
    """What `Storage.probe` found out about an address that can be written."""

    create_only: bool
    """A second create of the same name is refused, so commits are safe against concurrent writers."""


class Storage:
    """Files below one address.

    Raises StorageError for an address whose scheme is unknown or whose client is not installed. Cheap to make; an
    actor opens its own from the address (clients do not survive a fork).
    """

    def __init__(self, uri: str) -> None:
        try:
            self.fs, root = fsspec.url_to_fs(_absolute(uri), **_client_options(uri))
        except (ValueError, ImportError) as error:
            raise StorageError(
                f"run.uri {redact(uri)!r} cannot be opened: {redact(str(error))}. Use a folder, s3://bucket/path, or "
                "another fsspec scheme whose package is installed"
            ) from None
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.uri = redact(self.root if self.is_local else uri.rstrip("/"))
        """The address as it may be shown."""
        self.address = self.root if self.is_local else uri.rstrip("/")
        """The address that another process opens; it may hold credentials, so it is never shown."""

    def full(self, path: str) -> str:
        """Address of `path` for the fsspec client; refuses a path that leaves the run."""
        pieces = path.split("/")
        if path.startswith("/") or ".." in pieces or "\\" in path or "\0" in path:
            raise StorageError(f"{self.uri}: a record names the path {path!r}, which is not inside the run")
        return f"{self.root}/{path}" if path else self.root

    def read_bytes(self, path: str) -> bytes:
        """Content of a file; FileNotFoundError if there is none."""
        with self._explained("read", path):
            return bytes(self.fs.cat_file(self.full(path)))

    def read_many(self, paths: list[str]) -> dict[str, bytes]:
        """Contents of files by path; a file that vanished meanwhile is left out."""
        if self.is_local:
            found = {}
            for path in paths:
                try:
                    found[path] = self.read_bytes(path)
                except FileNotFoundError:
                    continue
            return found
        with self._explained("read", ""):
            by_address = {self.fs._strip_protocol(self.full(path)): path for path in paths}
            contents: dict[str, Any] = self.fs.cat(list(by_address), on_error="return") if by_address else {}
        for value in contents.values():
            if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                raise StorageError(f"{self.uri} cannot be read: {redact(str(value))}") from None
        return {by_address[address]: value for address, value in contents.items() if isinstance(value, bytes)}

    def create(self, path: str, data: bytes) -> bool:
        """Write a small file that must not exist yet; False if it does."""
        with self._explained("write", path):
            return create_once(self.fs, self.full(path), data)

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file, atomically for readers."""
        with self._explained("write", path):
            write_atomic(self.fs, self.full(path), data)

    def put_file(self, source: Path, path: str) -> None:
        """Upload the local file `source`, atomically for readers."""
        with self._explained("write", path):
            put_atomic(self.fs, source, self.full(path))

    def get_file(self, path: str, target: Path) -> None:
        """Download a file to `target`; FileNotFoundError if there is none."""
        with self._explained("read", path):
            self.fs.get_file(self.full(path), str(target))

    def move(self, source: str, target: str) -> None:
        """Rename a file (copy and delete on object stores)."""
        with self._explained("write", target):
            self.fs.mv(self.full(source), self.full(target))

    def remove(self, path: str) -> None:
        """Delete a file."""
        with self._explained("write", path):
            self.fs.rm_file(self.full(path))

    def list_files(self, prefix: str = "") -> dict[str, int]:
        """Sizes in bytes by path of all files below `prefix`, by one recursive listing, without unfinished writes."""
        top = self.full(prefix)
        with self._explained("list", prefix):
            if self.is_local:
                found = dict(_walk(top))
            else:
                found = {path: info["size"] for path, info in self.fs.find(top, detail=True).items()}
        cut = len(self.root) + 1
        return {
            path[cut:]: size
            for path, size in found.items()
            if not path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX) and path.startswith(self.root)
        }

    def probe(self) -> Probe:
        """Write, create twice, read back and remove a small file; StorageError if the address cannot be written."""
        path = f"probe-{secrets.token_hex(8)}"
        self.write(path, b"probe")
        try:
            if self.read_bytes(path) != b"probe":
                raise StorageError(f"{self.uri} does not read back what was written to it")
            return Probe(create_only=not self.create(path, b"again"))
        finally:
            self.remove(path)

    @contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        """Turn what the client raises into a StorageError that names the address and the mend."""
        try:
            yield
        except (FileNotFoundError, StorageError) as error:
            if action != "write" or isinstance(error, StorageError):
                raise
            raise StorageError(self._complaint(action, path, error)) from None
        except Exception as error:
            raise StorageError(self._complaint(action, path, error)) from error

    def _complaint(self, action: str, path: str, error: Exception) -> str:
        place = f"{self.uri}/{path}" if path else self.uri
        reason = redact(str(error)) or type(error).__name__
        if self.is_local:
            mend = "Check the path, its permissions and the free space, or set run.uri to another folder"
        else:
            mend = "Check the address, the credentials and the endpoint (s3: AWS_* variables), or set another run.uri"
        return f"cannot {action} {place}: {type(error).__name__}: {reason}. {mend}"


def _absolute(uri: str) -> str:
    if "://" in uri or "::" in uri:
        return uri
    return os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111 - the folder need not exist


def _client_options(uri: str) -> dict[str, Any]:
    # Listings change under us: other workers commit, and a stale listing would redo what is done.
    return {"use_listings_cache": False} if uri.startswith(("s3://", "s3a://")) else {}


def _walk(folder: str) -> Iterator[tuple[str, int]]:
    """Files below `folder` with their sizes; entries that vanish meanwhile are left out."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        else:
            try:
                yield entry.path, entry.stat().st_size
            except FileNotFoundError:
                continue

"""Weights on local disk: what is in a bucket is copied once per node, and looked at through one small record.

A pull writes a record beside what it pulled (``<address>.pulled.json``, never inside a folder, whose files are part of
its identity): source, commit, sizes and digests.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from lrag_ray.config.redaction import redact
from lrag_ray.errors import WeightsError
from lrag_ray.store.address import Storage
from lrag_ray.store.seal import parsed_json
from lrag_ray.weights.published import Published

RECORD_SUFFIX = ".pulled.json"


class PulledFile(BaseModel):
    """One file of a pull."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size_bytes: int
    sha256: str


class PullRecord(BaseModel):
    """What a pull recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repository: str
    commit: str
    licence: str
    pulled_at: str
    files: dict[str, PulledFile]
    """By path inside the folder; by the file's own name for a single file."""


def is_remote(address: str) -> bool:
    """Whether the address is not a path of this machine."""
    return "://" in address and not address.startswith("file://")


def cache_folder() -> Path:
    """Where this machine keeps copies: $LRAG_WEIGHTS_CACHE, else ``lrag-ray/weights`` in the user's cache folder."""
    named = os.environ.get("LRAG_WEIGHTS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrag-ray" / "weights"


def split(address: str) -> tuple[Storage, str]:
    """Storage of the folder that an address is in, and its name there."""
    folder, _, name = address.rstrip("/").rpartition("/")
    return Storage(folder or ("/" if address.startswith("/") else "."), follow_links=True), name


def sizes_at(address: str) -> dict[str, int]:
    """Sizes in bytes of what is at an address: a file under its name, a folder's files under their paths inside it.

    Empty where there is nothing. Raises StorageError where the address cannot be asked.
    """
    storage, name = split(address)
    if storage.is_local and not Path(storage.full(name)).exists():
        # A link that leads to itself cannot even be listed.
        return {}
    inside = storage.list_files(name)
    if inside:
        # A file that is asked for as a folder lists itself.
        return {path.removeprefix(f"{name}/"): size for path, size in inside.items()}
    path = Path(storage.full(name))
    if storage.is_local and path.is_file():
        return {name: path.stat().st_size}
    return {}


def record_at(address: str) -> PullRecord | None:
    """What the pull of an address recorded; None without one, or where it cannot be read."""
    storage, name = split(address)
    try:
        return PullRecord.model_validate(parsed_json(storage.read_bytes(name + RECORD_SUFFIX)))
    except (FileNotFoundError, ValueError):
        return None


def known_sizes(address: str, published: Published | None) -> dict[str, int]:
    """Sizes that the files at an address should have, as far as its pull recorded or the publication states them."""
    record = record_at(address)
    if record is not None:
        return {path: file.size_bytes for path, file in record.files.items()}
    if published is None:
        return {}
    return {file.name: file.size_bytes for file in published.files if file.size_bytes is not None}


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_copy(address: str, cache: Path | None = None) -> Path:
    """Path on this machine of weights at any address; a local path is returned as it is.

    What is elsewhere is copied below `cache` (`cache_folder()` by default) the first time and found there
    afterwards, also by other processes of the node: one copies, the others wait. The copy appears under its name only
    when it is whole, and belongs to sizes (and recorded digests) of the original: a changed original is copied again.

    Raises WeightsError where there is nothing at the address or the copy differs from its record; StorageError.
    """
    if not is_remote(address):
        return Path(address.removeprefix("file://")).expanduser()
    sizes, record = sizes_at(address), record_at(address)
    if not sizes:
        raise WeightsError(
            f"{redact(address)} holds nothing. Fix: put the weights there with `lrag-ray weights pull CONFIG`, or "
            "correct the address in the configuration"
        )
    storage, name = split(address)
    known = record.model_dump_json() if record is not None else ""
    key = hashlib.sha256(f"{address}\0{sorted(sizes.items())}\0{known}".encode()).hexdigest()[:24]
    target = (cache or cache_folder()) / key / name
    if target.exists():
        return target
    with locked(target):
        if not target.exists():
            _copy(storage, name, sizes, record, target)
    return target


def _copy(storage: Storage, name: str, sizes: dict[str, int], record: PullRecord | None, target: Path) -> None:
    fresh = target.with_name(target.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.unlink(missing_ok=True)
    single = set(sizes) == {name}
    for path, size in sizes.items():
        part = fresh if single else fresh / path
        part.parent.mkdir(parents=True, exist_ok=True)
        storage.get_file(name if single else f"{name}/{path}", part)
        expected = record.files.get(path) if record is not None else None
        if part.stat().st_size != size or (expected is not None and file_digest(part) != expected.sha256):
            raise WeightsError(
                f"{storage.uri}/{name}: {path} arrived differently from what was recorded when it was pulled. "
                "Fix: pull it again (`lrag-ray weights pull CONFIG --again`)"
            )
    fresh.rename(target)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process of this machine at a time works on `target`; the lock is in the cache folder, not beside it."""
    name = hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:24]
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / name):
        yield

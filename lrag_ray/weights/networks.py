"""The weight files of scoring suites: fetched into a folder, archives unpacked, digests recorded, fit checked.

A pull that was cut off continues where it stopped, also in another process. An archive serves all of its networks with
one download and is not kept.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

from lrag_ray.config.redaction import redact
from lrag_ray.errors import LragError, WeightsError
from lrag_ray.scoring.suite import Suite, WeightFile
from lrag_ray.store.records import now_utc
from lrag_ray.wan.file_kinds import BoundedFile
from lrag_ray.weights.local import RECORD_SUFFIX, PulledFile, PullRecord, file_digest, locked, record_at

_RANGE_NOT_SATISFIABLE = 416
_MOST_UNPACKED = 8 * 2**30
"""Bytes from one archive: twice what the largest published one holds."""
_MOST_ENTRIES = 1000


class Source(NamedTuple):
    """One published address and the files that come from it."""

    url: str
    files: tuple[WeightFile, ...]

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return [file.name for file in self.files]


class PulledNetwork(NamedTuple):
    """What a pull did for one file."""

    name: str
    path: Path
    pulled: bool
    """False where it was there already."""
    size_bytes: int


class NetworkVerdict(NamedTuple):
    """Result of checking one file."""

    name: str
    path: Path
    """Where it is, or should be."""
    ok: bool
    detail: str


def sources(files: Sequence[WeightFile]) -> list[Source]:
    """Every address, in the order of the files."""
    by_url: dict[str, list[WeightFile]] = {}
    for file in files:
        by_url.setdefault(file.url, []).append(file)
    return [Source(url, tuple(group)) for url, group in by_url.items()]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in _files(path))


def pull_source(
    source: Source, *, again: bool = False, tell: Callable[[str], None] = lambda line: None
) -> list[PulledNetwork]:
    """Make sure that the files of one address are there; `again` replaces them.

    Digests are recorded beside them. Raises WeightsError where the address cannot be reached or what arrived is
    damaged or not the published file.
    """
    wanted = {file.name: file.path for file in source.files}
    first = next(iter(wanted.values()))
    with locked(first):
        missing = {file: file.path for file in source.files if again or not file.path.exists()}
        if missing:
            tell(f"{source.url} -> {', '.join(str(path) for path in missing.values())}")
            try:
                _pull(source, missing)
            except OSError as error:
                raise WeightsError(
                    f"{first.parent} cannot be written: {error}. Fix: make room, or give another --folder"
                ) from error
    pulled = {file.name for file in missing}
    return [PulledNetwork(name, path, name in pulled, size_of(path)) for name, path in wanted.items()]


def _pull(source: Source, missing: dict[WeightFile, Path]) -> None:
    first = next(iter(missing.values()))
    first.parent.mkdir(parents=True, exist_ok=True)
    arrived = _download(source.url, first, missing)
    for wanted, path in missing.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        member = wanted.member
        fresh = _unpacked(arrived, member, path, source.url) if member else arrived
        found = {file.relative_to(fresh).as_posix() if fresh.is_dir() else path.name: file for file in _files(fresh)}
        pulled = {
            inside: PulledFile(size_bytes=file.stat().st_size, sha256=file_digest(file))
            for inside, file in found.items()
        }
        expected = wanted.sha256
        if expected is not None and (digest := next(iter(pulled.values())).sha256) != expected:
            arrived.unlink()
            _remove(fresh)
            raise WeightsError(
                f"{source.url} arrived with sha256 {digest} for {wanted.name}, expected {expected}; it was thrown away"
                ". Fix: pull again, without a proxy that changes files"
            )
        _remove(path)
        fresh.rename(path)
        record = PullRecord(repository=source.url, commit="", licence=wanted.licence, pulled_at=now_utc(), files=pulled)
        path.with_name(path.name + RECORD_SUFFIX).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    arrived.unlink(missing_ok=True)


def _download(url: str, beside: Path, missing: dict[WeightFile, Path]) -> Path:
    part = beside.with_name(f"{beside.name}.{sha256(url.encode()).hexdigest()[:16]}.part")
    try:
        for attempt in (1, 2):
            with part.open("ab") as arriving:
                try:
                    http_get(url, arriving, resume_size=arriving.tell(), displayed_filename=beside.name)
                    return part
                except HfHubHTTPError as error:
                    # Nothing is left to ask for: the process before died between the last byte and the renaming.
                    if attempt == 2 or error.response.status_code != _RANGE_NOT_SATISFIABLE:
                        raise
                    arriving.truncate(0)
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        # An address that it was sent on to may be a signed one.
        reason = redact((str(error).splitlines() or [type(error).__name__])[0])
        places = "; ".join(
            f"{f'its member {file.member}' if file.member else 'it'} at {path}" for file, path in missing.items()
        )
        raise WeightsError(
            f"{url} (weights of {', '.join(file.name for file in missing)}) cannot be fetched: {reason}. What has "
            "arrived is kept and the same command continues from there. Without network: fetch it elsewhere and put "
            f"{places}"
        ) from error
    raise AssertionError("the second attempt returns or raises")


def _unpacked(archive: Path, member: str, path: Path, url: str) -> Path:
    """The member of the archive as a fresh file or folder beside `path`."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
    _remove(fresh)
    try:
        with archive.open("rb") as file, zipfile.ZipFile(cast(BinaryIO, BoundedFile(file))) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir() and _is_in(entry.filename, member)]
            if not entries:
                archive.unlink()
                raise WeightsError(f"{url} holds no {member}. Fix: put the published file at {path} yourself")
            _refuse_bomb(entries, url)
            for entry in entries:
                target = fresh / entry.filename.removeprefix(member) if member.endswith("/") else fresh
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(entry) as inside, target.open("wb") as out:
                    shutil.copyfileobj(inside, out)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        archive.unlink()
        _remove(fresh)
        raise WeightsError(f"{url} arrived damaged ({error}); it was thrown away. Fix: pull again") from error
    return fresh


def _refuse_bomb(entries: Sequence[zipfile.ZipInfo], url: str) -> None:
    """zipfile stops at the size that an entry declares, so these are the bytes that would be written."""
    size = sum(entry.file_size for entry in entries)
    if len(entries) > _MOST_ENTRIES or size > _MOST_UNPACKED:
        raise zipfile.BadZipFile(f"it would unpack to {len(entries):,} files with {size:,} bytes")
    for entry in entries:
        # Unix modes are in the upper half; a link would be written as a file that holds its target.
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise zipfile.BadZipFile(f"its entry {entry.filename!r} is a link or a special file")
        if entry.flag_bits & 1:
            raise zipfile.BadZipFile(f"its entry {entry.filename!r} is encrypted")


def _is_in(name: str, member: str) -> bool:
    """Whether an archive's entry is the member, or is in the folder that it names and nowhere else."""
    if name == member:
        return True
    inside = name.removeprefix(member)
    odd = "\\" in name or inside.startswith("/") or ".." in Path(name).parts
    return member.endswith("/") and name.startswith(member) and bool(inside) and not odd


def _files(path: Path) -> Sequence[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verify_networks(suite: Suite[Any], *, digests: bool = True) -> Iterator[NetworkVerdict]:
    """Check every file of a suite: presence, digest, and that it loads. `digests` reads every byte once more."""
    loaded: set[str] = set()
    for file in suite.weight_files():
        try:
            if not file.path.exists():
                tried = " and ".join(map(str, file.places))
                raise WeightsError(f"nothing at {tried}. Fix: {suite.pull_command}")
            detail = [f"{size_of(file.path) / 1e6:.1f} MB", _digest(suite, file) if digests else ""]
            if file.name not in loaded:
                loaded.update(suite.check_loads(file.name))
            detail.append("loads")
            yield NetworkVerdict(file.name, file.path, True, ", ".join(part for part in detail if part))
        except LragError as error:
            yield NetworkVerdict(file.name, file.path, False, str(error))


def _digest(suite: Suite[Any], weights: WeightFile) -> str:
    path = weights.path
    record = record_at(str(path))
    if record is not None:
        expected, origin = {inside: file.sha256 for inside, file in record.files.items()}, "recorded at the pull"
    elif weights.sha256 is not None:
        expected, origin = {path.name: weights.sha256}, "published"
    else:
        return "no digest is known"
    for inside, digest in expected.items():
        file = path / inside if path.is_dir() else path
        if not file.is_file() or (actual := file_digest(file)) != digest:
            raise WeightsError(
                f"{file} (weights of {weights.name}) is "
                f"{f'another file: sha256 {actual}' if file.is_file() else 'missing'}, {origin}: {digest}. "
                f"Fix: {suite.pull_command} --again"
            )
    return f"sha256 as {origin}"

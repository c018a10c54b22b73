"""The official networks of VBench-Long: fetched into a folder, archives unpacked, digests recorded, fit checked.

A pull that was cut off goes on where it stopped, also in another process. An archive serves all of its networks with
one download and is not kept.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get

from lrag_ray.config.redaction import redact
from lrag_ray.errors import LragError, WeightsError
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NETWORKS, OFFICIAL, NetworkName
from lrag_ray.scoring.vbench_long.weights import WeightFiles
from lrag_ray.store.records import now_utc
from lrag_ray.weights.local import RECORD_SUFFIX, PulledFile, PullRecord, file_digest, locked, record_at

_RANGE_NOT_SATISFIABLE = 416


class Source(NamedTuple):
    """One published address and the networks that come from it."""

    url: str
    names: tuple[NetworkName, ...]


class PulledNetwork(NamedTuple):
    """What a pull did for one network."""

    name: NetworkName
    path: Path
    pulled: bool
    """False where it was there already."""
    size_bytes: int


class NetworkVerdict(NamedTuple):
    """Result of checking one network."""

    name: NetworkName
    path: Path
    """Where it lies, or should lie."""
    ok: bool
    detail: str


def sources() -> list[Source]:
    """Every address, in the order of the networks."""
    by_url: dict[str, list[NetworkName]] = {}
    for name in NETWORKS:
        by_url.setdefault(OFFICIAL[name].url, []).append(name)
    return [Source(url, tuple(names)) for url, names in by_url.items()]


def place_of(files: WeightFiles, name: NetworkName) -> Path:
    """Where the file of a network lies, else where it is put."""
    places = files.places(name)
    return next((place for place in places if place.exists()), places[0])


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in _files(path))


def pull_source(
    source: Source, files: WeightFiles, *, again: bool = False, tell: Callable[[str], None] = lambda line: None
) -> list[PulledNetwork]:
    """Make sure that the networks of one address are there; `again` replaces them.

    Digests are recorded beside them. Raises WeightsError where the address cannot be reached or what arrived is
    damaged or not the published file.
    """
    wanted = {name: place_of(files, name) for name in source.names}
    first = wanted[source.names[0]]
    with locked(first):
        missing = {name: path for name, path in wanted.items() if again or not path.exists()}
        if missing:
            tell(f"{source.url} -> {', '.join(str(path) for path in missing.values())}")
            try:
                _pull(source, missing)
            except OSError as error:
                raise WeightsError(
                    f"{first.parent} cannot be written: {error}. Mend: make room, or give another --folder"
                ) from error
    return [PulledNetwork(name, path, name in missing, size_of(path)) for name, path in wanted.items()]


def _pull(source: Source, missing: dict[NetworkName, Path]) -> None:
    first = next(iter(missing.values()))
    first.parent.mkdir(parents=True, exist_ok=True)
    arrived = _download(source.url, first, missing)
    for name, path in missing.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        member = OFFICIAL[name].member
        fresh = _unpacked(arrived, member, path, source.url) if member else arrived
        found = {file.relative_to(fresh).as_posix() if fresh.is_dir() else path.name: file for file in _files(fresh)}
        pulled = {
            inside: PulledFile(size_bytes=file.stat().st_size, sha256=file_digest(file))
            for inside, file in found.items()
        }
        expected = OFFICIAL[name].sha256
        if expected is not None and (digest := next(iter(pulled.values())).sha256) != expected:
            arrived.unlink()
            _remove(fresh)
            raise WeightsError(
                f"{source.url} arrived with sha256 {digest} for {name}, expected {expected}; it was thrown away. "
                "Mend: pull again, without a proxy that changes files"
            )
        _remove(path)
        fresh.rename(path)
        record = PullRecord(
            repository=source.url, commit="", licence=OFFICIAL[name].licence, pulled_at=now_utc(), files=pulled
        )
        path.with_name(path.name + RECORD_SUFFIX).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    arrived.unlink(missing_ok=True)


def _download(url: str, beside: Path, missing: dict[NetworkName, Path]) -> Path:
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
            f"{f'its member {OFFICIAL[name].member}' if OFFICIAL[name].member else 'it'} at {path}"
            for name, path in missing.items()
        )
        raise WeightsError(
            f"{url} (weights of {', '.join(missing)}) cannot be fetched: {reason}. What has arrived is kept and the "
            f"same command goes on with it. Without network: fetch it elsewhere and put {places}"
        ) from error
    raise AssertionError("the second attempt returns or raises")


def _unpacked(archive: Path, member: str, path: Path, url: str) -> Path:
    """The member of the archive as a fresh file or folder beside `path`."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
    _remove(fresh)
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir() and _is_in(entry.filename, member)]
            if not entries:
                archive.unlink()
                raise WeightsError(f"{url} holds no {member}. Mend: put the published file at {path} yourself")
            for entry in entries:
                target = fresh / entry.filename.removeprefix(member) if member.endswith("/") else fresh
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(entry) as inside, target.open("wb") as out:
                    shutil.copyfileobj(inside, out)
    except (zipfile.BadZipFile, EOFError) as error:
        archive.unlink()
        _remove(fresh)
        raise WeightsError(f"{url} arrived damaged ({error}); it was thrown away. Mend: pull again") from error
    return fresh


def _is_in(name: str, member: str) -> bool:
    """Whether an archive's entry is the member, or lies in the folder that it names and nowhere else."""
    return name == member or (member.endswith("/") and name.startswith(member) and ".." not in Path(name).parts)


def _files(path: Path) -> Sequence[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verify_networks(files: WeightFiles, *, digests: bool = True) -> Iterator[NetworkVerdict]:
    """Check every network: presence, digest, and that it loads. `digests` reads every byte once more."""
    built: set[NetworkName] = set()
    for name in NETWORKS:
        path = place_of(files, name)
        try:
            found = files.find(name)
            detail = [f"{size_of(found) / 1e6:.1f} MB", _digest(name, found) if digests else ""]
            if name not in built:
                networks = Networks(files)
                networks.build(name)
                built |= networks.digests.keys()
            detail.append("loads")
            yield NetworkVerdict(name, found, True, ", ".join(part for part in detail if part))
        except LragError as error:
            yield NetworkVerdict(name, path, False, str(error))


def _digest(name: NetworkName, path: Path) -> str:
    record, official = record_at(str(path)), OFFICIAL[name]
    if record is not None:
        expected, origin = {inside: file.sha256 for inside, file in record.files.items()}, "recorded at the pull"
    elif official.sha256 is not None:
        expected, origin = {path.name: official.sha256}, "published"
    else:
        return "no digest is known"
    for inside, digest in expected.items():
        file = path / inside if path.is_dir() else path
        if not file.is_file() or (actual := file_digest(file)) != digest:
            raise WeightsError(
                f"{file} (weights of {name}) is {f'another file: sha256 {actual}' if file.is_file() else 'missing'}, "
                f"{origin}: {digest}. Mend: lrag-ray weights pull --suite vbench_long --again"
            )
    return f"sha256 as {origin}"

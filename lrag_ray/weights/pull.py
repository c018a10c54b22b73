"""Fetching published weights from the Hub into a folder or bucket.

A pull that was cut off continues where it stopped, also in another process: what has arrived waits under a name that
holds the content's tag (``<file>.<etag>.part``). The environment is that of huggingface_hub: HF_ENDPOINT for a mirror,
HF_TOKEN for repositories that ask for one, HF_HUB_OFFLINE to forbid the network.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from lrag_ray.config.redaction import redact
from lrag_ray.errors import WeightsError
from lrag_ray.store.records import now_utc
from lrag_ray.wan.file_kinds import HEAD_BYTES, no_weights
from lrag_ray.weights.local import (
    RECORD_SUFFIX,
    PulledFile,
    PullRecord,
    cache_folder,
    file_digest,
    is_remote,
    known_sizes,
    locked,
    sizes_at,
    split,
)
from lrag_ray.weights.needs import Need
from lrag_ray.weights.published import HubFile, Published

WEIGHTS_SUFFIXES = (".pt", ".pth", ".safetensors")
_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Failures of this machine, which no other network would fix."""
_GATED = "Fix: set HF_TOKEN to a token that may read it; some repositories want their terms accepted first. "
_HINTS: dict[int | None, str] = {
    401: _GATED,
    403: _GATED,
    404: "It is not there (any more), or the mirror does not have it. ",
    429: "Fix: try again later, or set HF_TOKEN: users with a token may ask for more. ",
}


class PullResult(NamedTuple):
    """What a pull did."""

    need: Need
    pulled: bool
    """False where everything was there already."""
    size_bytes: int


def pull(need: Need, *, again: bool = False, tell: Callable[[str], None] = lambda line: None) -> PullResult:
    """Make sure that what `need` names is at its address; `again` replaces what is there.

    Digests are recorded beside it. Raises WeightsError where it is not published under that name, cannot be reached,
    or arrives damaged; StorageError for an address that cannot be written.
    """
    present = sizes_at(need.address)
    published = need.published
    if present and not again and _complete(need, present):
        return PullResult(need, False, sum(present.values()))
    if published is None:
        raise WeightsError(
            f"{need.keys[0]}: nothing is published under the name {need.name!r}, so it cannot be pulled to "
            f"{need.address}. Fix: put the file there yourself, or keep the published names (`lrag-ray weights list`)"
        )
    storage, name = split(need.address)
    landing = cache_folder() / "landing" if is_remote(need.address) else Path(storage.root)
    files: dict[str, PulledFile] = {}
    commit = published.revision
    with locked(landing / name):
        for file in published.files:
            inside = f"{name}/{file.name}" if published.is_folder else name
            tell(f"{published.repository} {file.path} -> {need.address}")
            commit, arrived = _fetch(published, file, landing / inside, need)
            files[file.name] = arrived
            if is_remote(need.address):
                storage.put_file(landing / inside, inside)
                (landing / inside).unlink()
    record = PullRecord(
        repository=published.repository, commit=commit, licence=published.licence, pulled_at=now_utc(), files=files
    )
    storage.write(name + RECORD_SUFFIX, record.model_dump_json(indent=1).encode())
    return PullResult(need, True, sum(file.size_bytes for file in files.values()))


def _complete(need: Need, present: dict[str, int]) -> bool:
    """Whether every file is there with its known size; a user's own file, of which nothing is known, is left alone."""
    named = {file.name for file in need.published.files} if need.published is not None else set()
    known = known_sizes(need.address, need.published)
    return named <= set(present) and all(present.get(path) == size for path, size in known.items())


def _fetch(published: Published, file: HubFile, target: Path, need: Need) -> tuple[str, PulledFile]:
    """Bring one file to `target`; returns the commit it is of, and its size and digest."""
    # Read at call time: the constant of huggingface_hub is fixed when it is imported.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    url = hf_hub_url(published.repository, file.path, revision=published.revision, endpoint=endpoint)
    headers = build_hf_headers()
    try:
        metadata = get_hf_file_metadata(url, headers=dict(headers), endpoint=endpoint)
        if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
            # The content is with a third party, which must not see the token.
            headers.pop("authorization", None)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{(metadata.etag or 'untagged')[:16]}.part")
        with part.open("ab") as arriving:
            http_get(
                metadata.location,
                arriving,
                resume_size=arriving.tell(),
                headers=headers,
                expected_size=metadata.size,
                displayed_filename=file.name,
            )
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        if isinstance(error, OSError) and error.errno in _OUR_DISK:
            raise WeightsError(
                f"{target} cannot be written: {error.strerror}. Fix: make room there, or give another place; what has "
                "arrived is kept and the same command continues from there"
            ) from error
        raise WeightsError(_unreachable(published, file, need, endpoint, error)) from error
    arrived = PulledFile(size_bytes=part.stat().st_size, sha256=file_digest(part))
    for digest in (file.sha256, metadata.etag):
        # The tag of a large file is its SHA-256; small files have a git tag, which says nothing here.
        if digest is not None and len(digest) == 64 and digest != arrived.sha256:
            part.unlink()
            raise WeightsError(
                f"{published.repository} {file.path} arrived with sha256 {arrived.sha256}, expected {digest}; it was "
                "thrown away. Fix: pull again, without a proxy that changes files"
            )
    if mistaken := _mistaken(part, target):
        part.unlink()
        raise WeightsError(
            f"what {redact(endpoint)} sends for {published.repository} {file.path} {mistaken}. It was thrown away: is "
            "there a login page between this machine and the Hub, or does HF_ENDPOINT name no mirror of it?"
        )
    part.replace(target)
    return metadata.commit_hash or published.revision, arrived


def _unreachable(published: Published, file: HubFile, need: Need, endpoint: str, error: Exception) -> str:
    size = f" ({file.size_bytes:,} bytes)" if file.size_bytes else ""
    where = f"{need.address.rstrip('/')}/{file.name}" if published.is_folder else need.address
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = _HINTS.get(status, "")
    # The address that was asked may be a mirror with a password, or one that was signed for this token.
    return redact(
        f"{published.repository} {file.path}{size} cannot be fetched from {endpoint}: {reason}. {hint}What has arrived "
        f"is kept and the same command continues from there. Without network: fetch the file elsewhere "
        f"(`hf download {published.repository} {file.path}`) and put it at {where}"
    )


def _mistaken(part: Path, target: Path) -> str | None:
    """What a file is that cannot be what was asked for, whatever the server called it; None where it can."""
    with part.open("rb") as arrived:
        head = arrived.read(HEAD_BYTES)
    if target.suffix in WEIGHTS_SUFFIXES:
        return no_weights(head, target.suffix)
    return "is a web page" if head.lstrip()[:5].lower() in (b"<!doc", b"<html") else None

"""Leftovers of a run: files that failed attempts, probes and interrupted writes left, and that nothing needs any more.

What counts is never a leftover: whatever a commit or a record of a decoded video names, readable or not as a whole,
and the part records beside named parts, from which a run that grows continues. Parts of rollouts that are not finished
are their checkpoints and stay unless they are asked for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from lrag_ray.errors import StorageError
from lrag_ray.store.address import PROBE_PREFIX, FileDetails
from lrag_ray.store.create_only import TEMPORARY_PREFIX
from lrag_ray.store.dataset_index import SEGMENT_PREFIX, DamagedIndexError, read_manifest
from lrag_ray.store.decoded import FOLDER as DECODED
from lrag_ray.store.decoded import DecodedVideos, read_decoded
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.records import Record, RolloutId
from lrag_ray.store.rollouts import Inventory, RolloutRun, without_cycle_search
from lrag_ray.store.uploads import abort_upload, unfinished_uploads

Kind = Literal[
    "unfinished write",
    "unfinished upload",
    "probe",
    "set aside",
    "unnamed part",
    "unnamed video",
    "unfinished rollout",
    "merged index",
]
"""unnamed: an attempt wrote it and no commit names it. set aside: a record that did not count. unfinished rollout: its
next start would continue from this part. merged index: a part of an index whose rows are in a larger one."""

BESIDE_S = 3600.0
"""What `decode`, `score` and `report` write is left alone for that long at least: they may be at work beside a `gc`."""

_BESIDE = (f"{DECODED}/", "scores/", "summary/")
_ATTEMPT_FILE = re.compile(r"^(?P<rollout>rollouts/[^/]+/[^/]+/[^/]+)/attempt-[^/]+/(?P<name>[^/]+)$")
_DECODED_FILE = re.compile(rf"^(?P<rollout>{DECODED}/[^/]+/[^/]+/[^/]+/[^/]+)/attempt-[^/]+/[^/]+$")
_SET_ASIDE = re.compile(
    rf"^((rollouts|{DECODED}/[^/]+)/[^/]+/[^/]+/[^/]+/(commit|video)-\d+\.json|(scores|chat)/.+\.(parquet|json)|"
    r"rollouts/[^/]+/[^/]+/[^/]+/attempt-[^/]+/part-\d+-\d+\.json|embeddings/.+\.safetensors|failures/.+\.json|"
    r"run\.json)\.invalid-[0-9a-f]+$"
)
_PART = re.compile(r"^(?P<stem>part-\d+-\d+)\.(json|safetensors|trace\.parquet)$")


class Leftover(Record):
    """A file, or an upload that was never completed."""

    path: str
    """Below the run."""
    kind: Kind
    size_bytes: int
    upload_id: str | None = None
    """For an unfinished upload."""


class Leftovers(NamedTuple):
    """What was found."""

    found: list[Leftover]
    too_young: int
    """Leftovers that were written so lately that someone may still be at work on them."""
    notes: list[str]
    """What could not be looked at."""


@without_cycle_search()
def find_leftovers(run: RolloutRun, *, older_than_s: float, unfinished: bool) -> Leftovers:
    """Leftovers that were last written more than `older_than_s` ago; with `unfinished` parts of open rollouts too.

    What commands write that may be at work meanwhile is kept for `BESIDE_S` at least. StorageError where there is no
    run, and where the listing does not show a record that is there.
    """
    identity = run.require()
    files = run.storage.list_details()
    inventory, decoded = run.inventory(), read_decoded(run)
    candidates = [
        *_by_name(files),
        *_of_attempts(files, inventory, identity, unfinished=unfinished),
        *_of_decoding(files, decoded),
        *_of_index(files, run),
    ]
    now = time.time()

    def is_old(path: str, written_s: float | None) -> bool:
        least_s = max(older_than_s, BESIDE_S) if path.startswith(_BESIDE) else older_than_s
        return written_s is not None and written_s < now - least_s

    old = [one for one in candidates if is_old(one.path, files[one.path].modified_s)]
    listed_commits = (state.path for states in inventory.commits.values() for state in states.values())
    _refuse_hidden_records(run, old, identity, {*listed_commits, *decoded.records})
    too_young, notes = len(candidates) - len(old), []
    try:
        for upload in unfinished_uploads(run.storage):
            if is_old(upload.path, upload.begun_s):
                old.append(
                    Leftover(
                        path=upload.path,
                        kind="unfinished upload",
                        size_bytes=upload.size_bytes,
                        upload_id=upload.upload_id,
                    )
                )
            else:
                too_young += 1
    except StorageError as error:
        notes.append(f"unfinished uploads were not looked for: {error}")
    return Leftovers(sorted(old, key=lambda one: one.path), too_young, notes)


def _refuse_hidden_records(
    run: RolloutRun, leftovers: Iterable[Leftover], identity: RunIdentity, listed: Container[str]
) -> None:
    """StorageError if a commit or record beside a leftover is there that was not listed: it may name the leftover.

    A store whose listings lag behind, or a proxy that cuts them, would else have finished work deleted.
    """
    asked = set[str]()
    for leftover in leftovers:
        if match := _ATTEMPT_FILE.match(leftover.path):
            backbone = identity.backbones.get(leftover.path.split("/")[1])
            horizons = backbone.horizons if backbone is not None else []
            asked.update(f"{match['rollout']}/commit-{horizon.latent_frames}.json" for horizon in horizons)
        elif match := _DECODED_FILE.match(leftover.path):
            asked.add(f"{match['rollout']}/{Path(leftover.path).stem}.json")
    for path in run.storage.read_many([path for path in sorted(asked) if path not in listed]):
        raise StorageError(
            f"{run.uri}/{path} is there, but a listing does not show it: so it is not known what is unused. Nothing "
            "was removed; try again later, when the store lists all that it holds"
        )


def remove_leftovers(run: RolloutRun, leftovers: Iterable[Leftover]) -> None:
    """Delete them; records first, so that nothing ever names a file that is gone."""
    files = []
    for leftover in leftovers:
        if leftover.upload_id is not None:
            abort_upload(run.storage, leftover.path, leftover.upload_id)
        else:
            files.append(leftover.path)
    run.storage.remove_many([path for path in files if path.endswith(".json")])
    run.storage.remove_many([path for path in files if not path.endswith(".json")])


def _by_name(files: Mapping[str, FileDetails]) -> Iterator[Leftover]:
    for path, details in files.items():
        if path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX):
            yield Leftover(path=path, kind="unfinished write", size_bytes=details.size_bytes)
        elif path.startswith(PROBE_PREFIX) and "/" not in path:
            yield Leftover(path=path, kind="probe", size_bytes=details.size_bytes)
        elif _SET_ASIDE.match(path):
            yield Leftover(path=path, kind="set aside", size_bytes=details.size_bytes)


def _of_attempts(
    files: Mapping[str, FileDetails], inventory: Inventory, identity: RunIdentity, *, unfinished: bool
) -> Iterator[Leftover]:
    named = set(_named_by_commits(inventory))
    folders = {match["rollout"] for path in files if (match := _ATTEMPT_FILE.match(path))}
    stored = identity.rollouts_at(folders)
    known = {rollout.path for rollout in stored}
    finished = {rollout.path for rollout in stored if _finished(inventory, rollout, identity)}
    unreadable = {
        folder for folder, states in inventory.commits.items() if any(s.commit is None for s in states.values())
    }
    for path, details in files.items():
        match = _ATTEMPT_FILE.match(path)
        # A folder of nobody's, or with a commit that names nobody knows what: hands off.
        if match is None or match["rollout"] not in known or match["rollout"] in unreadable:
            continue
        if path in named or match["name"].startswith(TEMPORARY_PREFIX) or _SET_ASIDE.match(path):
            continue
        part = _PART.match(match["name"])
        kind: Kind = "unnamed video" if part is None else "unnamed part"
        if part is not None:
            stem = path[: -len(match["name"])] + part["stem"]
            if f"{stem}.safetensors" in named:
                continue
            # A part without its record does not exist for anybody.
            if match["rollout"] not in finished and f"{stem}.json" in files:
                if not unfinished:
                    continue
                kind = "unfinished rollout"
        yield Leftover(path=path, kind=kind, size_bytes=details.size_bytes)


def _of_decoding(files: Mapping[str, FileDetails], decoded: DecodedVideos) -> Iterator[Leftover]:
    named = {record.video.path for record in decoded.records.values()}
    doubtful = {path.rsplit("/", 1)[0] for path in decoded.problems}
    for path, details in files.items():
        match = _DECODED_FILE.match(path)
        if match is None or path in named or match["rollout"] in doubtful:
            continue
        if not path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX):
            yield Leftover(path=path, kind="unnamed video", size_bytes=details.size_bytes)


def _of_index(files: Mapping[str, FileDetails], run: RolloutRun) -> Iterator[Leftover]:
    """Segments that the index no longer names; a reader that opened the dataset before finds their rows again."""
    segments = [path for path in files if path.startswith(SEGMENT_PREFIX)]
    try:
        manifest = read_manifest(run.storage) if segments else None
    except DamagedIndexError:
        return
    named = {segment.path for segment in manifest.segments} if manifest is not None else set()
    for path in segments:
        if manifest is not None and path not in named and not path.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX):
            yield Leftover(path=path, kind="merged index", size_bytes=files[path].size_bytes)


def _named_by_commits(inventory: Inventory) -> Iterator[str]:
    for states in inventory.commits.values():
        for state in states.values():
            if state.commit is not None:
                yield from (file.path for file in state.commit.files)


def _finished(inventory: Inventory, rollout: RolloutId, identity: RunIdentity) -> bool:
    """Whether every horizon of the run has a commit of its own that counts."""
    if rollout.path not in inventory.commits:
        return False
    commits = inventory.valid_commits(rollout)
    keys = identity.rollout_keys(rollout)
    return all(horizon in commits and commits[horizon].rollout_key == key for horizon, key in keys.items())

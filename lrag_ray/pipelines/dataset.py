"""What ``lrag-ray dataset info``, ``verify`` and ``export`` do."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lrag_ray.errors import StorageError, UsageError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_card import DatasetCard, read_card
from lrag_ray.store.dataset_files import (
    NOTES_FILE,
    LatentNote,
    add_to_shard,
    file_name,
    first_not_finite,
    tensor_bytes,
    values_digest,
)
from lrag_ray.store.dataset_index import FOLDER, MANIFEST_FILE, part_layout, read_manifest
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.parts import BrokenPartError
from lrag_ray.store.records import Record
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.thread_pool import thread_pool

WINDOW = 8
"""Consecutive latent frames that an encoder is trained on."""
EXPORT_FILE = "export.json"
IMPORTED = f"{FOLDER}/latents"
ExportForm = Literal["pt", "webdataset"]
_AT_ONCE = 4
"""Latents in memory at a time: 18 MB each at 90 frames of 832x480."""
_ROWS_AT_ONCE = 256
_LEASE_TTL_S = 120.0

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset in numbers."""

    uris: tuple[str, ...]
    rollouts: int
    frames: int
    shape: tuple[int, int, int]
    dtype: str
    size_bytes: int
    """Of the latents."""
    shortest: int
    """Latent frames of the shortest rollout."""
    longest: int
    windows: int
    """Runs of `WINDOW` consecutive latent frames."""
    prompts: int
    """Known ones: an imported folder may come without."""
    by_method: dict[str, int]
    """Rollouts by backbone and method."""
    duplicates: int
    """Rollouts that several of the addresses hold; each counts once."""
    left_out: tuple[str, ...]
    """Committed latents that are not in the dataset, each with the reason."""
    digest: str
    cards: tuple[DatasetCard | None, ...]
    """By address; None where there is none."""


def dataset_info(uris: Sequence[str]) -> DatasetInfo:
    """Describe the dataset at one or more addresses. StorageError and UsageError as `LatentDataset.open`."""
    data = LatentDataset.open(*uris)
    frames = data.frames
    groups = data.columns(["backbone", "method", "prompt_id"])
    return DatasetInfo(
        uris=tuple(data.uris),
        rollouts=len(data),
        frames=int(frames.sum()),
        shape=data.shape,
        dtype=data.form.dtype,
        size_bytes=int(frames.sum()) * data.form.frame_bytes,
        shortest=int(frames.min()),
        longest=int(frames.max()),
        windows=int((frames - WINDOW + 1).clip(min=0).sum()),
        prompts=len(set(groups["prompt_id"]) - {""}),
        by_method=dict(
            Counter(
                " ".join(filter(None, pair)) or "imported"
                for pair in zip(groups["backbone"], groups["method"], strict=True)
            )
        ),
        duplicates=data.duplicates,
        left_out=tuple(map(str, data.left_out)),
        digest=data.digest,
        cards=tuple(read_card(Storage(uri)) for uri in uris),
    )


@dataclass(frozen=True)
class Damage:
    """A rollout whose latents are not what the index says."""

    rollout: str
    problem: str


@dataclass(frozen=True)
class DatasetCheck:
    """What a check found."""

    exit_code: int
    """0 all whole, 1 something is damaged."""
    uris: tuple[str, ...]
    rollouts: int
    frames: int
    damaged: tuple[Damage, ...]


def verify_dataset(uris: Sequence[str]) -> DatasetCheck:
    """Read every latent and the index: sizes, checksums, digests, shapes, and values that are not finite."""
    data = LatentDataset.open(*uris)
    found = list(_side_by_side(partial(_damage_of, data), range(len(data))))
    damaged = (*_damage_of_indexes(uris), *_left_out(data), *(each for each in found if each is not None))
    return DatasetCheck(int(bool(damaged)), tuple(data.uris), len(data), int(data.frames.sum()), damaged)


def _left_out(data: LatentDataset) -> Iterator[Damage]:
    return (Damage(each.path, each.problem) for each in data.left_out)


def _damage_of_indexes(uris: Sequence[str]) -> Iterator[Damage]:
    """Segments that are not what their manifest says: readers take rows out of them without reading them whole."""
    for storage in map(Storage, uris):
        manifest = read_manifest(storage)
        for segment in manifest.segments if manifest is not None else ():
            if storage.digest(segment.path) != (segment.size_bytes, segment.sha256):
                problem = f"does not have the recorded checksum. Fix: delete {MANIFEST_FILE} and make the dataset again"
                yield Damage(f"{storage.uri}/{segment.path}", problem)


def _damage_of(data: LatentDataset, index: int) -> Damage | None:
    entry, storage = data.rollouts[index], data.storage_of(index)
    title = f"{entry.run}/{entry.rollout}"
    try:
        for part in data.parts(index):
            try:
                file = storage.read_bytes(part.path)
            except FileNotFoundError:
                return Damage(title, f"{part.path} is missing")
            if len(file) != part.size_bytes:
                return Damage(title, f"{part.path} has {len(file)} bytes instead of {part.size_bytes}")
            if hashlib.sha256(file).hexdigest() != part.sha256:
                return Damage(title, f"{part.path} does not have the recorded checksum")
            layout = part_layout(storage, part.path, part.size_bytes, part.frames)
            if (layout.form, layout.offset) != (data.form, part.offset):
                return Damage(title, f"{part.path} does not hold its latents where the index says")
    except (BrokenPartError, StorageError) as error:
        return Damage(title, str(error))
    latents = _checked(data, index)
    if isinstance(latents, Damage):
        return latents
    if bad := first_not_finite(latents):
        return Damage(title, bad)
    return None


class ExportRecord(Record):
    """``export.json``: which dataset a folder was exported from."""

    form: ExportForm
    dtype: str
    digest: str
    rollouts: int
    shard_bytes: int | None


@dataclass(frozen=True)
class ExportOutcome:
    """What an export made."""

    exit_code: int
    """0 everything is exported, 1 something could not be."""
    uri: str
    rollouts: int
    frames: int
    files_made: int
    files_there: int
    """Files that an earlier export of the same dataset had made."""
    digest: str
    """Of the dataset as it is stored."""
    dtype: str
    """Of the exported latents."""
    damaged: tuple[Damage, ...]
    """Rollouts whose latents are not what was stored; the files that would hold them are not made."""


def export_dataset(
    uris: Sequence[str],
    to: str,
    *,
    form: ExportForm = "pt",
    dtype: Literal["stored", "bfloat16"] = "stored",
    shard_bytes: int = 1 << 30,
) -> ExportOutcome:
    """Write a dataset into a folder or bucket: ``latent_000000.pt`` files, or tar shards of about `shard_bytes`.

    The numbers follow the order of the dataset, by prompt and sample. The same call again continues. UsageError where
    the folder holds another export, or files that no export made.
    """
    data = LatentDataset.open(*uris)
    target = Storage(to, follow_links=True)
    kind = data.form.dtype if dtype == "stored" else dtype
    record = ExportRecord(
        form=form,
        dtype=kind,
        digest=data.digest,
        rollouts=len(data),
        shard_bytes=shard_bytes if form == "webdataset" else None,
    )
    there = _claim(target, record)
    write = partial(_write_pt, data, target, kind) if form == "pt" else partial(_write_shard, data, target, kind)
    names = _pt_names(data) if form == "pt" else _shard_names(data, kind, shard_bytes)
    missing = [each for each in names if each[0] not in there]
    unwritten = [each for each in _side_by_side(write, missing) if each is not None]
    damaged = (*_left_out(data), *unwritten)
    if form == "pt":
        notes = (_note(data, i, f"{file_name(i)}.pt", kind) for i in range(len(data)))
        target.write(NOTES_FILE, "".join(f"{note.model_dump_json()}\n" for note in notes).encode())
    return ExportOutcome(
        exit_code=int(bool(damaged)),
        uri=target.uri,
        rollouts=len(data),
        frames=int(data.frames.sum()),
        files_made=len(missing) - len(unwritten),
        files_there=len(names) - len(missing),
        digest=record.digest,
        dtype=kind,
        damaged=damaged,
    )


def _claim(target: Storage, record: ExportRecord) -> set[str]:
    """The files of an earlier start of the same export."""
    there = {path for path in target.list_files() if path.endswith((".pt", ".tar"))}
    try:
        known = ExportRecord.opened(target.read_bytes(EXPORT_FILE))
    except FileNotFoundError:
        if there:
            raise UsageError(
                f"{target.uri} holds {counted(len(there), 'latent file')} that no export made. Fix: give an "
                f"empty folder"
            ) from None
        target.write(EXPORT_FILE, record.model_dump_json(indent=1).encode())
        return set()
    except ValueError:
        known = None
    if known != record:
        raise UsageError(
            f"{target.uri} holds another export ({EXPORT_FILE}): other latents, format or dtype. A dataset that "
            "grew is another one. Fix: give an empty folder"
        )
    return there


def _pt_names(data: LatentDataset) -> list[tuple[str, range]]:
    return [(f"{file_name(i)}.pt", range(i, i + 1)) for i in range(len(data))]


def _shard_names(data: LatentDataset, dtype: str, shard_bytes: int) -> list[tuple[str, range]]:
    """Shards and the rollouts that each holds; they depend on the dataset alone, so a later start cuts alike."""
    frame_bytes = data.form.model_copy(update={"dtype": dtype}).frame_bytes
    shards, first, size = [], 0, 0
    for index, frames in enumerate(data.frames.tolist()):
        if index > first and size + frames * frame_bytes > shard_bytes:
            shards.append(range(first, index))
            first, size = index, 0
        size += frames * frame_bytes
    shards.append(range(first, len(data)))
    return [(f"shard-{number:06d}.tar", each) for number, each in enumerate(shards)]


def _write_pt(data: LatentDataset, target: Storage, dtype: str, file: tuple[str, range]) -> Damage | None:
    latents = _checked(data, file[1].start)
    if isinstance(latents, Damage):
        return latents
    target.write(file[0], tensor_bytes(latents.to(getattr(torch, dtype))))
    return None


def _write_shard(data: LatentDataset, target: Storage, dtype: str, file: tuple[str, range]) -> Damage | None:
    with scratch_folder() as scratch:
        local = scratch / "shard.tar"
        with tarfile.open(local, "w", format=tarfile.USTAR_FORMAT) as shard:
            for index in file[1]:
                latents = _checked(data, index)
                if isinstance(latents, Damage):
                    return latents
                converted = latents.to(getattr(torch, dtype))
                add_to_shard(shard, file_name(index), converted, _note(data, index, file_name(index), dtype))
        target.put_file(local, file[0])
    return None


def _checked(data: LatentDataset, index: int) -> Tensor | Damage:
    """All latents of a rollout, if they are what was stored."""
    entry = data.rollouts[index]
    title = f"{entry.run}/{entry.rollout}"
    try:
        latents = data.read(index)
    except StorageError as error:
        return Damage(title, str(error))
    if values_digest(latents) != entry.latents_digest:
        return Damage(title, "the latents do not have the recorded digest")
    return latents


def _note(data: LatentDataset, index: int, name: str, dtype: str) -> LatentNote:
    entry = data.rollouts[index]
    digest = entry.latents_digest
    if dtype != data.form.dtype:
        digest = values_digest(data.read(index).to(getattr(torch, dtype)))
    shared = set(LatentNote.model_fields) & set(entry._fields) - {"latents_digest"}
    return LatentNote(file=name, latents_digest=digest, **{field: getattr(entry, field) for field in shared})


def _side_by_side(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in order, a few items at a time."""
    with thread_pool(_AT_ONCE, "rollouts") as workers:
        for batch in batched(items, _AT_ONCE):
            yield from workers.map(work, batch)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch

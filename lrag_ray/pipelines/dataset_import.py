"""What ``lrag-ray dataset import`` does: a dataset from ``.pt`` files or tar shards of latents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save as save_safetensors
from torch import Tensor

from lrag_ray.errors import UsageError
from lrag_ray.events import Listener, Notice, silent
from lrag_ray.pipelines.dataset import WINDOW, batched
from lrag_ray.pipelines.lease import keep_lease
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_card import DatasetCard
from lrag_ray.store.dataset_files import (
    BadLatentError,
    FoundLatent,
    LatentNote,
    dtype_name,
    first_not_finite,
    read_latent,
    read_notes,
    read_shard,
    values_digest,
)
from lrag_ray.store.dataset_index import (
    FOLDER,
    MOST_SIZE,
    FormedRow,
    IndexRow,
    IndexWriter,
    LatentForm,
    SegmentFile,
    part_layout,
    read_manifest,
)
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.lease import RUN
from lrag_ray.store.records import now_utc
from lrag_ray.store.run_dir import RUN_FILE
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.versions import versions

IMPORTED = f"{FOLDER}/latents"
_ROWS_AT_ONCE = 256
_LEASE_TTL_S = 120.0
_MOST_WARNINGS = 20


@dataclass(frozen=True)
class ImportOutcome:
    """What an import made."""

    exit_code: int
    """0 everything is imported, 1 something could not be."""
    uri: str
    imported: int
    """Latents that this start added."""
    there: int
    """Latents that were in the dataset before."""
    rollouts: int
    """Of the dataset now."""
    frames: int
    digest: str | None
    left_out: dict[str, str]
    """Files that could not be imported: the reason, by name."""


def import_dataset(
    source: str, to: str, *, window: int = WINDOW, licence: str = "unknown", listener: Listener = silent
) -> ImportOutcome:
    """Make a dataset at `to` from a folder or bucket of ``.pt`` files [T, C, H, W], or of tar shards.

    Files that are damaged, hold other shapes, or have fewer frames than `window` are left out and named. The same call
    again continues and adds what is new. Raises UsageError for a source without latents, and for a target that holds a
    run; LeaseError while another command writes there.
    """
    origin, target = Storage(source, follow_links=True), Storage(to)
    files = sorted(path for path in origin.list_files() if path.endswith((".pt", ".tar")) and "/" not in path)
    if not files:
        raise UsageError(f"{origin.uri} holds no .pt file and no .tar shard. Fix: name the folder that holds them")
    if _exists(target, RUN_FILE):
        raise UsageError(
            f"{target.uri} holds a run, whose dataset is made from its own rollouts. Fix: give another --to"
        )
    with (
        keep_lease(target, "dataset import", [RUN], ttl_s=_LEASE_TTL_S, listener=listener),
        scratch_folder() as scratch,
    ):
        return _Import(origin, target, window, licence, scratch, listener).run(files)


class _Import:
    def __init__(
        self, origin: Storage, target: Storage, window: int, licence: str, scratch: Path, listener: Listener
    ) -> None:
        self._origin, self._target, self._window, self._licence = origin, target, window, licence
        self._scratch, self._listener = scratch, listener
        self._left_out: dict[str, str] = {}
        manifest = read_manifest(target)
        self._writer = IndexWriter(target, manifest)
        self._known: dict[str, str] = {}
        """Digest by name of what the dataset holds."""
        for segment in self._writer.manifest.segments:
            rows = SegmentFile(target, segment).read(["rollout", "latents_digest"]).to_pylist()
            self._known.update((row["rollout"], row["latents_digest"]) for row in rows)
        self._there = 0
        self._added = 0
        self._warnings = 0

    def run(self, files: Sequence[str]) -> ImportOutcome:
        """Import everything and write the card."""
        for batch in batched(self._rows(files), _ROWS_AT_ONCE):
            self._writer.add(batch)
            self._added += len(batch)
        if (more := self._warnings - _MOST_WARNINGS) > 0:
            self._listener(
                Notice(f"{more:,} more latents are left out or hold values that are not finite", warning=True)
            )
        manifest = self._writer.manifest
        digest = None
        if manifest.rollouts:
            digest = LatentDataset.open(self._target.address).digest
            DatasetCard(
                origin=f"imported from {self._origin.uri.rstrip('/').rpartition('/')[2]}",
                licence=self._licence,
                versions=versions(),
                form=manifest.form,
                rollouts=manifest.rollouts,
                frames=manifest.frames,
                digest=digest,
                updated_at=now_utc(),
            ).write(self._target)
        return ImportOutcome(
            exit_code=int(bool(self._left_out)),
            uri=self._target.uri,
            imported=self._added,
            there=self._there,
            rollouts=manifest.rollouts,
            frames=manifest.frames,
            digest=digest,
            left_out=self._left_out,
        )

    def _rows(self, files: Sequence[str]) -> Iterator[FormedRow]:
        form = self._writer.manifest.form
        for position, found in enumerate(self._latents(files)):
            # Bytes of a name that are not UTF-8 could not be stored.
            found = found._replace(name=found.name.encode(errors="replace").decode())
            row = self._row(position, found, form)
            if row is not None:
                form = form or row.form
                self._known[row.row.rollout] = row.row.latents_digest
                yield row

    def _latents(self, files: Sequence[str]) -> Iterator[FoundLatent]:
        """Latents in the order of their names."""
        notes = read_notes(self._origin)
        for path in files:
            local = self._local(path)
            if path.endswith(".tar"):
                for found in read_shard(local, self._scratch):
                    name = path if found.name == path else f"{path}/{found.name}"
                    yield found._replace(name=name)
                continue
            try:
                yield FoundLatent(path, read_latent(local), notes.get(path))
            except BadLatentError as error:
                yield FoundLatent(path, None, None, str(error))

    def _local(self, path: str) -> Path:
        if self._origin.is_local:
            return Path(self._origin.full(path))
        local = self._scratch / f"source{Path(path).suffix}"
        self._origin.get_file(path, local)
        return local

    def _row(self, position: int, found: FoundLatent, form: LatentForm | None) -> FormedRow | None:
        """The row of a latent that is new; None for one that is there or is left out, which is named."""
        name, latents = found.name, found.latents
        problem = found.problem if latents is None else self._unusable(latents, form)
        if latents is None or problem:
            return self._leave_out(name, problem)
        digest = values_digest(latents)
        if name in self._known:
            if self._known[name] != digest:
                return self._leave_out(name, "the dataset holds other latents under this name")
            self._there += 1
            return None
        if bad := first_not_finite(latents):
            self._warn(f"{name}: {bad}; it is imported as it is")
        note = found.note if found.note is not None and found.note.latents_digest == digest else None
        return FormedRow(self._stored(position, name, latents, digest, note), _form_of(latents))

    def _unusable(self, latents: Tensor, form: LatentForm | None) -> str:
        frames, *sizes = latents.shape
        if max(sizes) > MOST_SIZE:
            return f"holds a tensor {list(latents.shape)}, and no size of a latent is above {MOST_SIZE}"
        if frames < self._window:
            return f"has {counted(frames, 'latent frame')}, fewer than a window of {self._window}"
        if form is not None and _form_of(latents) != form:
            return f"holds latents {_form_of(latents)}, the others are {form}"
        return ""

    def _leave_out(self, name: str, reason: str) -> FormedRow | None:
        self._left_out[name] = reason
        self._warn(f"{name} {reason}: left out")
        return None

    def _warn(self, text: str) -> None:
        """Report what is wrong with a latent; beyond the first few, the outcome alone names them."""
        self._warnings += 1
        if self._warnings <= _MOST_WARNINGS:
            self._listener(Notice(text, warning=True))

    def _stored(self, position: int, name: str, latents: Tensor, digest: str, note: LatentNote | None) -> IndexRow:
        path = f"{IMPORTED}/{position:06d}-{digest[:16]}.safetensors"
        data = save_safetensors({"latents": latents})
        self._target.write(path, data)
        frames = latents.shape[0]
        return IndexRow(
            key=note.key if note else digest,
            prompt_index=note.prompt_index if note else position,
            sample=note.sample if note else 0,
            frames=frames,
            part=[path],
            part_first_frame=[0],
            part_frames=[frames],
            part_offset=[part_layout(self._target, path, len(data), frames).offset],
            part_bytes=[len(data)],
            part_sha256=[hashlib.sha256(data).hexdigest()],
            rollout=name,
            backbone=note.backbone if note else "",
            method=note.method if note else "",
            prompt_id=note.prompt_id if note else "",
            prompt=note.prompt if note else "",
            latents_digest=digest,
        )


def _form_of(latents: Tensor) -> LatentForm:
    _, channels, height, width = latents.shape
    return LatentForm(channels=channels, height=height, width=width, dtype=dtype_name(latents))


def _exists(storage: Storage, path: str) -> bool:
    try:
        storage.read_bytes(path)
    except FileNotFoundError:
        return False
    return True

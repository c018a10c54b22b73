"""Rows of a dataset's index, made from the commits of a run: all at once, or while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from lrag_ray.errors import StorageError, UsageError
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_index import (
    DamagedIndexError,
    FormedRow,
    IndexRow,
    IndexWriter,
    LatentForm,
    SegmentFile,
    part_layout,
    read_manifest,
    table_of,
)
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.parts import BrokenPartError
from lrag_ray.store.records import Commit, RolloutId
from lrag_ray.store.rollouts import Inventory, RolloutRun
from lrag_ray.store.s3 import READERS
from lrag_ray.thread_pool import thread_pool

_COMPARED = ("rollout", "frames", "latents_digest", "part", "part_bytes")
"""Columns by which a row is known to be that of a commit."""


class LeftOut(NamedTuple):
    """Latents that were committed and are not in the dataset."""

    path: str
    """The commit, or the rollout whose parts are damaged."""
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class CommittedRows(NamedTuple):
    """What a run without an index holds."""

    table: pa.Table
    """Rows of `ROW_SCHEMA`."""
    form: LatentForm | None
    """Of the latents; None where nothing is committed."""
    left_out: tuple[LeftOut, ...]


class RunIndex:
    """The index of a run that goes on. One at a time: it works under the lease of the run."""

    def __init__(self, run: RolloutRun, identity: RunIdentity) -> None:
        self._run = run
        self._identity = identity
        self.writer = IndexWriter(run.storage)
        self._indexed = set[str]()

    def catch_up(self, inventory: Inventory, warn: Callable[[str], None]) -> None:
        """Bring the index to what `inventory` shows; it is made anew where it says something else than the commits.

        `warn` receives a message for each commit whose parts are damaged: these are not in the dataset.
        """
        commits = {commit.rollout.path: commit for commit in committed(self._identity, inventory)}
        try:
            manifest = read_manifest(self._run.storage)
            rows = [
                row
                for segment in (manifest.segments if manifest is not None else ())
                for row in SegmentFile(self._run.storage, segment).read(_COMPARED).to_pylist()
            ]
        except (DamagedIndexError, FileNotFoundError) as error:
            warn(f"the index of the dataset is made anew: {error}")
            manifest, rows = None, []
        indexed = {row["rollout"] for row in rows}
        if len(indexed) < len(rows) or not all(_is_of(row, commits.get(row["rollout"])) for row in rows):
            manifest, indexed = None, set()
        self.writer, self._indexed = IndexWriter(self._run.storage, manifest), indexed
        missing = [commit for path, commit in commits.items() if path not in indexed]
        if manifest is None and not missing:
            self.writer.write_manifest()
        self._add(missing, warn)

    def add(self, rollouts: Iterable[RolloutId], warn: Callable[[str], None]) -> None:
        """Add rollouts that were committed since; one that is in the index already is left to `catch_up`."""
        new = [rollout for rollout in rollouts if rollout.path not in self._indexed]
        commits = [commit for each in new for commit in committed(self._identity, self._run.inventory(each))]
        self._add(commits, warn)

    def _add(self, commits: Sequence[Commit], warn: Callable[[str], None]) -> None:
        rows = rows_of(self._run.storage, self._identity, commits, lambda each: warn(str(each)))
        self.writer.add(rows)
        self._indexed.update(row.row.rollout for row in rows)


def _is_of(row: dict[str, Any], commit: Commit | None) -> bool:
    return commit is not None and (row["frames"], row["latents_digest"], row["part"], row["part_bytes"]) == (
        commit.latent_frames,
        commit.latents_digest,
        [part.path for part in commit.latent_parts],
        [part.size_bytes for part in commit.latent_parts],
    )


def committed(identity: RunIdentity, inventory: Inventory) -> list[Commit]:
    """The longest commit of each rollout of the run, prompt-major; what another configuration made is left out."""
    found = []
    for rollout in identity.rollouts_at(inventory.commits):
        keys = identity.rollout_keys(rollout)
        own = [commit for n, commit in inventory.valid_commits(rollout).items() if commit.rollout_key == keys.get(n)]
        if own:
            found.append(max(own, key=lambda commit: commit.latent_frames))
    return found


def _not_counting(identity: RunIdentity, inventory: Inventory) -> Iterator[LeftOut]:
    """Commits of the run that do not count, and would have added a rollout or made one longer."""
    longest = {commit.rollout.path: commit.latent_frames for commit in committed(identity, inventory)}
    for rollout in identity.rollouts_at(inventory.commits):
        for frames, state in sorted(inventory.commits[rollout.path].items()):
            if state.problem is not None and frames > longest.get(rollout.path, 0):
                yield LeftOut(state.path, state.problem)


def rows_of(
    storage: Storage, identity: RunIdentity, commits: Sequence[Commit], left_out: Callable[[LeftOut], None]
) -> list[FormedRow]:
    """Rows of committed rollouts, in order; `left_out` receives those whose parts are damaged."""
    with thread_pool(1 if storage.is_local else READERS, "header") as readers:
        made = list(readers.map(partial(_row_or_problem, storage, identity), commits))
    for each in made:
        if isinstance(each, LeftOut):
            left_out(each)
    return [row for row in made if isinstance(row, FormedRow)]


def _row_or_problem(storage: Storage, identity: RunIdentity, commit: Commit) -> FormedRow | LeftOut:
    parts = commit.latent_parts
    try:
        layouts = [part_layout(storage, part.path, part.size_bytes, part.frames) for part in parts]
    except BrokenPartError as error:
        return LeftOut(commit.rollout.path, str(error))
    if len({layout.form for layout in layouts}) != 1:
        return LeftOut(commit.rollout.path, "it holds parts of different shapes")
    prompt = identity.prompts[commit.rollout.prompt_id]
    row = IndexRow(
        key=commit.rollout_key,
        prompt_index=prompt.index,
        sample=commit.rollout.sample,
        frames=commit.latent_frames,
        part=[part.path for part in parts],
        part_first_frame=[part.first_frame for part in parts],
        part_frames=[part.frames for part in parts],
        part_offset=[layout.offset for layout in layouts],
        part_bytes=[part.size_bytes for part in parts],
        part_sha256=[part.sha256 for part in parts],
        rollout=commit.rollout.path,
        backbone=commit.rollout.backbone,
        method=commit.rollout.method,
        prompt_id=commit.rollout.prompt_id,
        prompt=prompt.text,
        latents_digest=commit.latents_digest,
    )
    return FormedRow(row, layouts[0].form)


def committed_rows(storage: Storage) -> CommittedRows:
    """All rows of a run without an index.

    Raises StorageError where there is no run, UsageError where backbones differ in latent shape.
    """
    run = RolloutRun(storage.address, storage.options)
    identity = run.read()
    if identity is None:
        raise StorageError(
            f"{storage.uri} holds no dataset: there is no run at this address. Fix: `lrag-ray run` makes latents (job: "
            "latents), `lrag-ray dataset import` makes a dataset of .pt files or tar shards; or correct the address"
        )
    inventory = run.inventory()
    left_out = list(_not_counting(identity, inventory))
    rows = rows_of(storage, identity, committed(identity, inventory), left_out.append)
    forms = {row.row.backbone: row.form for row in rows}
    if len(set(forms.values())) > 1:
        listed = ", ".join(f"{backbone} {form}" for backbone, form in forms.items())
        raise UsageError(f"{storage.uri} holds latents of different shapes ({listed}): a dataset has one")
    return CommittedRows(table_of([row.row for row in rows]), next(iter(forms.values()), None), tuple(left_out))

"""Rows of a dataset's index, made from the commits of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa

from lrag_ray.errors import StorageError, UsageError
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_index import FormedRow, LatentForm, longest, row_of, table_of
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.parts import BrokenPartError
from lrag_ray.store.records import Commit
from lrag_ray.store.rollouts import Inventory, RolloutRun


def committed(identity: RunIdentity, inventory: Inventory) -> list[Commit]:
    """The longest commit of each rollout of the run, prompt-major; what another configuration made is left out."""
    found = []
    for rollout in identity.rollouts_at(inventory.commits):
        keys = identity.rollout_keys(rollout)
        commits = inventory.valid_commits(rollout)
        own = [commit for frames, commit in commits.items() if commit.rollout_key == keys.get(frames)]
        if (commit := longest(own)) is not None:
            found.append(commit)
    return found


def rows_of(
    storage: Storage,
    identity: RunIdentity,
    commits: Iterable[Commit],
    broken: Callable[[str], None],
) -> list[FormedRow]:
    """Rows of committed rollouts; `broken` is told of those whose parts are damaged."""
    rows = []
    for commit in commits:
        prompt = identity.prompts[commit.rollout.prompt_id]
        try:
            rows.append(row_of(storage, commit, prompt.index, prompt.text))
        except BrokenPartError as error:
            broken(str(error))
    return rows


def committed_rows(storage: Storage) -> tuple[pa.Table, LatentForm | None]:
    """All rows of a run without an index, and what its latents are; None where nothing is committed.

    Raises StorageError where there is no run or a part is damaged, UsageError where backbones differ in latent shape.
    """
    run = RolloutRun(storage.address, storage.options)
    identity = run.require()

    def refuse(reason: str) -> None:
        raise StorageError(f"{storage.uri}: {reason}. Fix: the command that made the run makes it again")

    rows = rows_of(storage, identity, committed(identity, run.inventory()), refuse)
    forms = {row.row.backbone: row.form for row in rows}
    if len(set(forms.values())) > 1:
        listed = ", ".join(f"{backbone} {form}" for backbone, form in forms.items())
        raise UsageError(f"{storage.uri} holds latents of different shapes ({listed}): a dataset has one")
    return table_of([row.row for row in rows]), next(iter(forms.values()), None)

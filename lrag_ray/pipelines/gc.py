"""Collecting a run's garbage: what `lrag-ray gc` does, while nobody makes rollouts or decodes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lrag_ray.events import Listener, Notice, silent
from lrag_ray.pipelines.lease import keep_lease
from lrag_ray.store.gc import Leftover, find_leftovers, remove_leftovers
from lrag_ray.store.lease import DECODE, RUN, holders
from lrag_ray.store.rollouts import RolloutRun

_LEASE_TTL_S = 120.0


@dataclass(frozen=True)
class GcOutcome:
    """What was found, and whether it is gone now."""

    uri: str
    removed: bool
    size_bytes: int
    too_young: int
    """Leftovers that are kept because they were written so lately."""
    leftovers: tuple[Leftover, ...]

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """(files, bytes) by kind."""
        files: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for leftover in self.leftovers:
            files[leftover.kind] += 1
            size[leftover.kind] += leftover.size_bytes
        return {kind: (files[kind], size[kind]) for kind in sorted(files)}


def collect_garbage(
    run: RolloutRun,
    *,
    remove: bool = False,
    older_than_s: float = 3600,
    unfinished: bool = False,
    listener: Listener = silent,
) -> GcOutcome:
    """List the leftovers of a run, or remove them.

    `unfinished` counts the parts of rollouts that are not finished as leftovers: they would then begin again. Raises
    StorageError where there is no run, and LeaseError, before anything is removed, while a driver works on it.
    """
    run.require()
    if remove:
        with keep_lease(run.storage, "gc", [RUN, DECODE], ttl_s=_LEASE_TTL_S, listener=listener):
            found = find_leftovers(run, older_than_s=older_than_s, unfinished=unfinished)
            remove_leftovers(run, found.found)
    else:
        found = find_leftovers(run, older_than_s=older_than_s, unfinished=unfinished)
        for at_work in {str(one): one for one in holders(run.storage).values() if not one.is_free}:
            text = f"{at_work} may be at work on the run: some of this may be its own"
            listener(Notice(text, warning=True))
    for note in found.notes:
        listener(Notice(note, warning=True))
    return GcOutcome(
        uri=run.uri,
        removed=remove,
        size_bytes=sum(leftover.size_bytes for leftover in found.found),
        too_young=found.too_young,
        leftovers=tuple(_sorted(found.found)),
    )


def _sorted(leftovers: Sequence[Leftover]) -> list[Leftover]:
    return sorted(leftovers, key=lambda leftover: (leftover.kind, leftover.path))

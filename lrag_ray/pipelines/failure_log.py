"""Keeps the failure records of a run up to date while a job works."""

from __future__ import annotations

import time
from collections.abc import Callable

from lrag_ray.errors import StorageError
from lrag_ray.store.address import Storage
from lrag_ray.store.failures import clear_failures, failed_tasks, write_failure
from lrag_ray.store.records import FailureRecord, failure_folder

UNWRITTEN_FOR_S = 600.0
"""A driver continues for this long while failures cannot be written to storage."""
_WRITE_AGAIN_S = 15.0


class FailureLog:
    """Adds a record when an attempt fails and removes a task's records when it succeeds.

    Storage that cannot be written for a while does not end the job; see `UNWRITTEN_FOR_S`.
    """

    def __init__(self, storage: Storage, warn: Callable[[str], None]) -> None:
        self._storage = storage
        self._warn = warn
        self._changes: list[FailureRecord | tuple[str, str]] = []
        """Records to write and tasks (stage, title) to clear, in order."""
        self._known: set[str] | None = None
        """Folders of tasks with records, once they are needed."""
        self._written: dict[str, list[str]] = {}
        """Records of this start by folder: a listing may not show them yet."""
        self._unwritten_since = 0.0
        self._write_after = 0.0

    def add(self, failure: FailureRecord) -> None:
        """An attempt failed."""
        self._changes.append(failure)
        self.write()

    def clear(self, stage: str, task: str) -> None:
        """A task succeeded."""
        self._changes.append((stage, task))
        self.write()

    def write(self, *, force: bool = False) -> None:
        """Bring storage up to date; StorageError once that fails for `UNWRITTEN_FOR_S`, or under `force`."""
        now = time.monotonic()
        if not self._changes or (now < self._write_after and not force):
            return
        try:
            while self._changes:
                self._apply(self._changes[0])
                del self._changes[0]
        except StorageError as error:
            self._unwritten_since = self._unwritten_since or now
            if force or now - self._unwritten_since > UNWRITTEN_FOR_S:
                raise
            self._write_after = now + _WRITE_AGAIN_S
            self._warn(f"{len(self._changes)} changes of the failure records are not written yet: {error}")
        else:
            self._unwritten_since = 0.0

    def _apply(self, change: FailureRecord | tuple[str, str]) -> None:
        if self._known is None:
            self._known = failed_tasks(self._storage)
        if isinstance(change, FailureRecord):
            write_failure(self._storage, change)
            folder = change.path.rpartition("/")[0]
            self._known.add(folder)
            self._written.setdefault(folder, []).append(change.path)
        elif (folder := failure_folder(*change)) in self._known:
            clear_failures(self._storage, *change, self._written.pop(folder, []))
            self._known.discard(folder)

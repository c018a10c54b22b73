"""Failure records of a run, of tasks of any stage: written when an attempt fails, removed when its task succeeds."""

from __future__ import annotations

from collections.abc import Iterable

from lrag_ray.store.address import Storage
from lrag_ray.store.records import FailureRecord, failure_folder, why_not

FOLDER = "failures"


def write_failure(storage: Storage, failure: FailureRecord) -> None:
    """Store why an attempt failed."""
    storage.write(failure.path, failure.sealed())


def read_failures(storage: Storage) -> tuple[list[FailureRecord], list[str]]:
    """All failures, oldest first, and what is wrong with records that cannot be read."""
    paths = [path for path in storage.list_files(FOLDER) if path.endswith(".json")]
    records, broken = [], []
    for path, data in storage.read_many(paths).items():
        try:
            records.append(FailureRecord.opened(data))
        except ValueError as error:
            broken.append(f"{path}: not a failure record: {why_not(error)}")
    return sorted(records, key=lambda record: record.created_at), broken


def failed_tasks(storage: Storage) -> set[str]:
    """Folders of the tasks that have records."""
    return {path.rpartition("/")[0] for path in storage.list_files(FOLDER)}


def clear_failures(storage: Storage, stage: str, task: str, written: Iterable[str] = ()) -> None:
    """Remove the records of a task, which has succeeded; also those in `written`, which no listing may show yet."""
    for path in {*storage.list_files(failure_folder(stage, task)), *written}:
        storage.remove(path)

from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.config.schema import EngineSection
from lrag_ray.errors import INTERRUPTED, ClusterError, StorageError
from lrag_ray.events import AttemptFailed, Event, Notice, StageBegan, StageEnded, TaskFinished
from lrag_ray.pipelines import failure_log
from lrag_ray.pipelines.failure_log import FailureLog
from lrag_ray.pipelines.job import Job
from lrag_ray.stages.spec import Result
from lrag_ray.store.address import Storage
from lrag_ray.store.failures import read_failures
from lrag_ray.store.records import FailureRecord, now_utc

ROLLOUT = "rollouts/tiny/rag/00000-aa-0"


def failure(
    task: str = ROLLOUT, stage: str = "rollouts", attempt: str = "a", *, quarantined: bool = True
) -> FailureRecord:
    return FailureRecord(
        stage=stage,
        task=task,
        attempt=attempt,
        kind="exception",
        counted=True,
        counted_attempts=3 if quarantined else 1,
        quarantined=quarantined,
        reason="ValueError: poison",
        traceback="Traceback …",
        created_at=now_utc(),
    )


class Told(Job[int]):
    """A job that reports what it is made of, and returns its exit code."""

    command = "test"
    kinds = ("run",)

    def __init__(self, folder: Path, *events: Event, interrupt: bool = False) -> None:
        self.events: list[Event] = []
        super().__init__(Storage(str(folder)), EngineSection(), self.events.append)
        self._script = events
        self._interrupt = interrupt

    def do(self) -> None:
        with self.stage("rollouts", len(self._script)):
            for event in self._script:
                self.report(event)
            if self._interrupt:
                raise KeyboardInterrupt

    def outcome(self, exit_code: int) -> int:
        return exit_code


def test_a_task_that_is_quarantined_is_missing_whatever_its_stage(tmp_path: Path) -> None:
    for stage in ("text", "rollouts", "decode", "scoring"):
        job = Told(tmp_path / stage, AttemptFailed(failure("a task", stage)))
        assert job.start() == 1
        assert job.missing == {"a task": "ValueError: poison"}
        (record,), broken = read_failures(job.storage)
        assert (record.stage, record.task, record.traceback, broken) == (stage, "a task", "Traceback …", [])


def test_a_task_that_succeeds_is_not_missing_and_its_records_go(tmp_path: Path) -> None:
    retried = Told(
        tmp_path,
        AttemptFailed(failure(attempt="a", quarantined=False)),
        AttemptFailed(failure("another", attempt="b")),
        TaskFinished("rollouts", ROLLOUT, Result(made=2)),
    )
    assert retried.start() == 1
    assert retried.missing.keys() == {"another"} and retried.made == {"rollouts": 2}
    assert [record.task for record in read_failures(retried.storage)[0]] == ["another"]
    # A later start clears what an earlier one left.
    later = Told(tmp_path, TaskFinished("rollouts", "another", Result()))
    assert later.start() == 0
    assert read_failures(later.storage) == ([], [])


def test_a_quarantined_task_stays_missing_when_another_one_of_the_same_title_succeeds(tmp_path: Path) -> None:
    """With independent durations each horizon of a rollout is a task, and the rollout's folder is the title of all."""
    job = Told(tmp_path, AttemptFailed(failure()), TaskFinished("rollouts", ROLLOUT, Result()))
    assert job.start() == 1
    assert job.missing == {ROLLOUT: "ValueError: poison"}
    assert [record.task for record in read_failures(job.storage)[0]] == [ROLLOUT]


def test_an_interrupted_job_says_so_and_how_to_continue(tmp_path: Path) -> None:
    job = Told(tmp_path, AttemptFailed(failure()), interrupt=True)
    assert job.start() == INTERRUPTED
    assert [event.text for event in job.events if isinstance(event, Notice)] == [
        "interrupted; the same command continues"
    ]


def test_a_stage_is_bracketed_by_its_events(tmp_path: Path) -> None:
    job = Told(tmp_path)
    assert job.start() == 0
    began, ended = job.events
    assert began == StageBegan("rollouts", 0) and isinstance(ended, StageEnded)


def test_records_of_runs_from_before_stages_are_read(tmp_path: Path) -> None:
    """The format of version 0.1: a rollout and its key instead of stage and task."""
    storage = Storage(str(tmp_path))
    old = (
        '{"rollout": {"backbone": "tiny", "method": "rag", "prompt_id": "00000-aa", "sample": 0}, "rollout_key": "k", '
        '"attempt": "x", "kind": "death", "counted": false, "counted_attempts": 0, "quarantined": false, '
        '"reason": "lost", "traceback": "", "created_at": "2026-01-01T00:00:00.000+00:00"}'
    )
    storage.write("failures/tiny/rag/00000-aa-0/x.json", old.encode())
    (record,), broken = read_failures(storage)
    assert (record.stage, record.task, record.path, broken) == (
        "rollouts",
        ROLLOUT,
        "failures/tiny/rag/00000-aa-0/x.json",
        [],
    )


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A file where the folder of failures would be."""
    in_the_way = tmp_path / "failures" / "tiny"
    in_the_way.parent.mkdir()
    in_the_way.write_text("not a folder")
    return in_the_way


def test_failures_that_cannot_be_written_are_kept_and_written_later(tmp_path: Path, blocked: Path) -> None:
    warnings: list[str] = []
    log = FailureLog(Storage(str(tmp_path)), warnings.append)
    for attempt in ("one", "two"):
        log.add(failure(attempt=attempt))
    # Not tried again with every failure: each try takes storage's own retries.
    (warning,) = warnings
    assert "1 changes of the failure records are not written yet" in warning
    blocked.unlink()
    log.write(force=True)
    assert {record.attempt for record in read_failures(Storage(str(tmp_path)))[0]} == {"one", "two"}


def test_storage_that_stays_away_ends_the_job_after_a_while(
    tmp_path: Path, blocked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = FailureLog(Storage(str(tmp_path)), lambda _: None)
    log.add(failure())
    monkeypatch.setattr(failure_log, "UNWRITTEN_FOR_S", -1.0)
    with pytest.raises(StorageError, match="cannot write"):
        log.write(force=True)


def test_an_address_that_no_job_can_use_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:9")
    with pytest.raises(ClusterError, match="Ray Client address"):
        Told(tmp_path / "run").start()
    assert not list(tmp_path.rglob("*"))

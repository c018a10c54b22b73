"""The log of a job: events as short lines of JSON that give the events back, and the check of the client's version."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest

import lrag_ray
from jobs.entry import ADVANCED_EVERY_S, LONGEST_LINE, JsonLog, check_client, short_json
from lrag_ray.errors import RunEnvironmentError
from lrag_ray.events import (
    AttemptFailed,
    CellScored,
    Event,
    Notice,
    ReportWritten,
    RunEnded,
    RunPlanned,
    StageAdvanced,
    StageBegan,
    StageEnded,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
    TaskYielded,
    TrainingAdvanced,
    WorkerLost,
    from_json,
    log_record,
)
from lrag_ray.pipelines.submit.follow import outcome_in, show
from lrag_ray.stages.spec import Result
from lrag_ray.store.records import FailureRecord, now_utc

FAILURE = FailureRecord(
    task="t",
    attempt="a",
    kind="exception",
    counted=True,
    counted_attempts=3,
    quarantined=True,
    reason="why",
    traceback="lines\n" * 3,
    created_at=now_utc(),
)
EVENTS: list[Event] = [
    RunPlanned("s3://b/r", 4, 1, 2, 30),
    Notice("a\nb \N{SNOWMAN} \x1b[31m", warning=True),
    StageBegan("rollouts", 3),
    StageAdvanced("rollouts", 1, 3),
    StageEnded("rollouts", 1.5),
    TaskStarted("rollouts", "t", "a", "w"),
    TaskAdvanced("rollouts", "t", "w", 1, 8, "generating"),
    TaskFinished("rollouts", "t", Result(made=2, units=8, seconds=1.0, notes=("n",))),
    TaskYielded("rollouts", "t", "w", "drains"),
    AttemptFailed(FAILURE),
    WorkerLost("w", "gone"),
    TrainingAdvanced(2, 3, 40, 60, 2, "training", [0.5, 0.1, 0.0], [0.6, 0.2, 0.0], 0.8, 1, 12.5),
    CellScored("tiny", "rag", 9.0, 2, {"flicker": 0.5}, None),
    ReportWritten("s3://b/r/summary", ("report.html", "ranks.csv")),
    RunEnded("evaluate", "s3://b/r", "incomplete", 1, 2.5, 1, ("t: why",), None),
]


def test_every_event_comes_back_from_its_line() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    lines: list[str] = []
    log = JsonLog(lines.append)
    for event in EVENTS:
        log(event)
    shown: list[Event] = []
    for line in lines:
        assert line.isprintable() and json.loads(line)["at"]
        show(line, shown.append)
    assert shown == EVENTS
    # To the millisecond, and not the time of reading.
    assert all(0 <= (event.at - read.at).total_seconds() < 0.001 for event, read in zip(EVENTS, shown, strict=True))


@pytest.mark.parametrize(
    "line",
    [
        "plain text",
        '{"event": "StageBegan", "stage": "nothing", "total": 1}',
        '{"event": "StageBegan", "stage": "rollouts"}',
        '{"event": "OfAnotherVersion"}',
        '{"event": 5}',
        "[1]",
        '{"a": ',
        "{" * 5000,
    ],
)
def test_what_is_no_event_is_a_notice(line: str) -> None:
    shown: list[Event] = []
    show(line, shown.append)
    (notice,) = shown
    assert isinstance(notice, Notice)
    assert notice.text.startswith(line[:50])


def test_unknown_fields_are_left_out() -> None:
    assert from_json({**log_record(StageBegan("text", 2)), "of_a_later_version": 1}) == StageBegan("text", 2)


def test_a_very_long_line_is_shown_short() -> None:
    shown: list[Event] = []
    show("x" * 6_000_000, shown.append)
    (notice,) = shown
    assert isinstance(notice, Notice)
    assert len(notice.text) < 3000 and "6,000,000 characters" in notice.text


def test_lines_are_short_and_still_events() -> None:
    long = FAILURE.model_copy(update={"traceback": "x" * 6_000_000, "reason": "y" * 100_000})
    line = short_json(log_record(AttemptFailed(long)))
    assert len(line) <= LONGEST_LINE
    event = from_json(json.loads(line))
    assert isinstance(event, AttemptFailed)
    assert event.failure.task == "t" and event.failure.traceback.endswith("(6,000,000 characters)")
    line = short_json({"outcome": {"exit_code": 1, "missing": {f"rollout {n}": "z" * 500 for n in range(10_000)}}})
    found = outcome_in(line)
    assert len(line) <= LONGEST_LINE
    assert found is not None and found["exit_code"] == 1 and found["missing"]


def test_a_workers_progress_is_thinned() -> None:
    lines: list[str] = []
    now = 100.0
    log = JsonLog(lines.append, lambda: now)
    step = TaskAdvanced("rollouts", "t", "w", 1, 9, "generating")
    for event in (step, step, dataclasses.replace(step, step="storing"), dataclasses.replace(step, worker="v")):
        log(event)
    assert len(lines) == 3
    now += ADVANCED_EVERY_S
    log(dataclasses.replace(step, worker="v", done=5))
    assert json.loads(lines[-1])["done"] == 5


def test_a_client_of_another_version_is_refused() -> None:
    check_client(None)
    check_client(f"{lrag_ray.__version__}/{lrag_ray.NUMERICS_VERSION}")
    for client in (f"9.9/{lrag_ray.NUMERICS_VERSION}", f"{lrag_ray.__version__}/999", ""):
        with pytest.raises(RunEnvironmentError, match="--no-upload"):
            check_client(client)

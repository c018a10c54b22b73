"""Tasks through Ray Data: one rule for exceptions, deaths, refusals and stops, with the records of the pool."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from lrag_ray.engine.attempts import BARREN_DEATHS
from lrag_ray.engine.fan_out import FanOut
from lrag_ray.errors import ClusterError
from lrag_ray.events import AttemptFailed, Event, StageAdvanced, TaskFinished, TaskStarted, TaskYielded
from lrag_ray.stages.spec import Host, Outcome, Refused, Resources, Result, Stage, Task, Yielded

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


class Odd(Stage[str]):
    """Does what its payload says; leaves a line per attempt in `log`."""

    name = "scoring"

    def __init__(self, log: Path) -> None:
        self.log = log

    @property
    def resources(self) -> Resources:
        return Resources(cpus=1)

    def open(self, host: Host) -> OddWorker:
        return OddWorker(self.log, host)

    def progress(self, task: Task[str]) -> int:
        # Every attempt at this one gets a little further.
        return len(attempts(self.log, task.payload)) if task.payload == "slow" else 0


class OddWorker:
    def __init__(self, log: Path, host: Host) -> None:
        self.log, self.host = log, host

    def work(self, payload: str, attempt: str) -> Outcome:
        with self.log.open("a") as log:
            log.write(f"{payload} {attempt}\n")
        match payload:
            case "kill":
                os._exit(1)
            case "slow" if len(attempts(self.log, payload)) < BARREN_DEATHS + 2:
                os._exit(1)
            case "refuse":
                return Refused("not today")
            case "bug":
                raise KeyError("token=hunter2")
            case "flaky" if len(attempts(self.log, payload)) < 3:
                raise OSError("the network is away")
            case "wait":
                while not self.host.must_leave():
                    time.sleep(0.05)
                return Yielded("told to stop")
        return Result(made=2)


def attempts(log: Path, payload: str) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines() if line.split()[0] == payload]


def tasks(*payloads: str) -> list[Task[str]]:
    return [Task(f"{i}-{payload}", payload, name=f"the {payload} one") for i, payload in enumerate(payloads)]


def test_exceptions_refusals_and_deaths_are_counted_and_stop_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, seen = tmp_path / "log", list[Event]()
    given = tasks("kill", "fine", "refuse", "bug", "flaky", "good")
    failed = FanOut(Odd(log), 2, max_attempts=3, listener=seen.append).run(given)
    assert {task.payload for task in failed} == {"kill", "refuse", "bug"}
    assert capfd.readouterr().err == "", "Ray writes to the terminal of whoever runs this"
    done = {event.task: event.result for event in seen if isinstance(event, TaskFinished)}
    assert done == {f"the {name} one": Result(made=2) for name in ("fine", "flaky", "good")}
    assert [event.done for event in seen if isinstance(event, StageAdvanced)] == [1, 2, 3, 4, 5, 6]

    failures = [event.failure for event in seen if isinstance(event, AttemptFailed)]
    of = {name: [f for f in failures if f.task == f"the {name} one"] for name in ("kill", "refuse", "bug", "flaky")}
    assert all(f.stage == "scoring" for f in failures)
    assert [(f.kind, f.reason, f.quarantined) for f in of["refuse"]] == [("refused", "not today", True)]
    assert [(f.kind, f.counted_attempts, f.quarantined) for f in of["bug"]] == [
        ("exception", 1, False),
        ("exception", 2, False),
        ("exception", 3, True),
    ]
    assert of["bug"][0].reason == "KeyError: 'token=***'"
    assert "test_fan_out.py" in of["bug"][0].traceback and "hunter2" not in of["bug"][0].traceback
    assert [(f.kind, f.quarantined) for f in of["flaky"]] == [("exception", False)] * 2
    # A death counts from the third in a row without progress.
    assert [(f.kind, f.counted) for f in of["kill"]] == [("death", False)] * 2 + [("death", True)] * 3
    assert [f.attempt for f in of["kill"]] == attempts(log, "kill")
    started = [event.attempt for event in seen if isinstance(event, TaskStarted) and event.task == "the bug one"]
    assert started == [f.attempt for f in of["bug"]] == attempts(log, "bug")


def test_deaths_after_progress_do_not_count(tmp_path: Path) -> None:
    log, seen = tmp_path / "log", list[Event]()
    assert FanOut(Odd(log), 1, max_attempts=1, listener=seen.append).run(tasks("slow")) == []
    failures = [event.failure for event in seen if isinstance(event, AttemptFailed)]
    assert len(failures) == BARREN_DEATHS + 1 and not any(failure.counted for failure in failures)


class Broken(Odd):
    def open(self, host: Host) -> OddWorker:
        raise RuntimeError("no such package")


def test_workers_that_cannot_start_end_the_wave(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"scoring workers cannot start: .*no such package"):
        FanOut(Broken(tmp_path / "log"), 1).run(tasks("fine"))


def test_a_wave_stops_when_it_is_told_to(tmp_path: Path) -> None:
    log, seen = tmp_path / "log", list[Event]()
    fan_out = FanOut(Odd(log), 1, listener=seen.append)

    def stop_once_begun() -> None:
        while not log.exists():
            time.sleep(0.05)
        fan_out.stop()

    threading.Thread(target=stop_once_begun, daemon=True).start()
    assert fan_out.run(tasks("wait", "wait", "wait")) == []
    assert not [event for event in seen if isinstance(event, TaskFinished | AttemptFailed)]
    (stopped,) = [event for event in seen if isinstance(event, TaskYielded)]
    assert stopped.reason == "told to stop"

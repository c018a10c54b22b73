"""What a start passes on, however it ends; without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lrag_ray.config.load import complete
from lrag_ray.config.schema import RunConfig
from lrag_ray.config.source import Document
from lrag_ray.errors import ConfigError, StorageError
from lrag_ray.events import Event, Notice, RunEnded, log_record
from lrag_ray.pipelines import jobs
from lrag_ray.pipelines.stored_config import store_config
from lrag_ray.store.rollouts import RolloutRun
from tests.stages.make import make_config
from tests.watch.make import start_of


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    missing: dict[str, str] = field(default_factory=dict)


def start(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, ends: Callable[[], Outcome]
) -> tuple[list[Event], BaseException | None]:
    """Events of a start of `config` whose work is `ends`, and what it raised."""
    events: list[Event] = []

    def work(config: RunConfig, *, listener: Callable[[Event], None]) -> Outcome:
        for event in start_of():
            listener(event)
        return ends()

    monkeypatch.setitem(jobs.JOBS, "evaluate", work)
    try:
        jobs.start(config, listener=events.append)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - looked at by the test
        return events, error
    return events, None


def raising(error: BaseException) -> Callable[[], Outcome]:
    def raise_it() -> Outcome:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("ends", "state", "exit_code", "error"),
    [
        (lambda: Outcome(0), "done", 0, None),
        (lambda: Outcome(1, {"a video": "it is black"}), "incomplete", 1, None),
        (lambda: Outcome(130), "interrupted", 130, None),
        (raising(KeyboardInterrupt()), "interrupted", 130, None),
        (
            raising(StorageError("s3://key:hunter2@bucket is full")),
            "failed",
            3,
            "StorageError: s3://***@bucket is full",
        ),
        (raising(ConfigError("no")), "failed", 2, "ConfigError: no"),
        (raising(ZeroDivisionError("bug")), "failed", 1, "ZeroDivisionError: bug"),
    ],
)
def test_the_last_event_says_how_the_start_ended(
    ends: Callable[[], Outcome], state: str, exit_code: int, error: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    events, _ = start(monkeypatch, make_config(tmp_path), ends)
    last = events[-1]
    assert isinstance(last, RunEnded) and events[:-1] == start_of()
    assert (last.state, last.exit_code, last.error) == (state, exit_code, error)
    assert last.reasons == (("a video: it is black",) if state == "incomplete" else ())
    record = log_record(last)
    assert json.loads(json.dumps(record))["event"] == "RunEnded" and record["at"].endswith("+00:00")


def test_a_hook_that_fails_is_reported_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, watch={"on_end": {"command": ["/no/such/program"]}})
    events, error = start(monkeypatch, config, lambda: Outcome(0))
    assert error is None
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.warning and "/no/such/program" in notice.text
    # And an error of the run stays what it is.
    _, error = start(monkeypatch, config, raising(StorageError("full")))
    assert isinstance(error, StorageError)


def test_what_cannot_be_watched_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, watch={"on_end": {"webhook_from": "LRAG_TEST_NOT_SET"}})
    events, error = start(monkeypatch, config, lambda: Outcome(0))
    assert isinstance(error, ConfigError) and "LRAG_TEST_NOT_SET" in str(error) and events == []


def test_a_logger_that_breaks_in_the_middle_is_reported_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrag_ray.watch.tensorboard import TensorBoardLogger

    def broken(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "scalars", broken)
    config = make_config(tmp_path, watch={"tensorboard": {"folder": str(tmp_path / "tb")}})
    events, error = start(monkeypatch, config, lambda: Outcome(0))
    assert error is None
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert "watch.tensorboard: OSError: No space left on device. The run continues without it" in notice.text


def test_the_section_is_not_stored_with_the_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, watch={"on_end": {"webhook": "https://hooks.example.com/T000/secret-path"}})
    store_config(RolloutRun(config.run.uri), config)
    assert "secret-path" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ("{on_end: {}}", "watch.on_end: give exactly one of webhook, webhook_from and command"),
        ("{on_end: {command: [a], webhook: 'https://h/'}}", "watch.on_end: give exactly one of"),
        ("{on_end: {command: a b}}", "watch.on_end.command"),
        ("{on_end: {command: []}}", "watch.on_end.command"),
        ("{on_end: {webhook: 'hooks.example.com/x'}}", "watch.on_end.webhook: must be an address"),
        ("{on_end: {webhook: 'https://me:hunter2@h/x'}}", "webhook_from"),
        ("{on_end: {webhook_from: 'https://h/x'}}", "watch.on_end.webhook_from"),
        ("{on_end: {command: [a], timeout_s: 0}}", "watch.on_end.timeout_s"),
        ("{tensorboard: {folder: 's3://bucket/tb'}}", "must be a folder"),
        ("{wandb: {}}", "watch.wandb.project"),
        ("{wandb: {project: p, mode: of}}", "watch.wandb.mode"),
        ("{mlflow: {tracking_uri: 'https://me:hunter2@h/'}}", "credentials"),
        ("{metrics: 9090}", "watch.metrics"),
        ("{prometheus: true}", "watch.prometheus"),
    ],
)
def test_wrong_sections_are_refused_by_name(section: str, complaint: str) -> None:
    document = Document("run.yaml", make_config("runs/x").model_dump(mode="json", exclude_unset=True))
    with pytest.raises(ConfigError, match=complaint.replace("[", r"\[")) as caught:
        complete(document, [f"watch={section}"])
    assert "hunter2" not in str(caught.value)

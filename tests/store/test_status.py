"""What `status` says of a run: who works, which scores are meant to be there, and when nothing more will happen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrag_ray.cli import app as cli
from lrag_ray.scoring.per_video import PerVideoWorker
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.store.failures import write_failure
from lrag_ray.store.lease import Beat, LeaseRecord, new_record, take_lease
from lrag_ray.store.process import ProcessIdentity
from lrag_ray.store.records import FailureRecord, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.report.make_run import make_run
from tests.store.make import make_identity, rollout_id, store_commit

ELSEWHERE = ProcessIdentity(host="another", pid=1, space="another boot", started="1")


def quarantined(run: RolloutRun, task: str, stage: str = "rollouts") -> None:
    write_failure(
        run.storage,
        FailureRecord(
            stage=stage,
            task=task,
            attempt="a",
            kind="exception",
            counted=True,
            counted_attempts=3,
            quarantined=True,
            reason="boom",
            traceback="",
            created_at=now_utc(),
        ),
    )


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    """Two prompts, two horizons; the first prompt is done."""
    run, identity = RolloutRun(str(tmp_path / "run")), make_identity()
    run.ensure(identity)
    for frames in (6, 12):
        store_commit(run, identity, rollout_id(), frames)
    return run


def held(run: RolloutRun, **changes: object) -> LeaseRecord:
    record = new_record("run", 60).model_copy(update={"process": ELSEWHERE, **changes})
    take_lease(run.storage, record, lambda _: None)
    return record


def test_nobody_at_work_gives_no_rate_and_says_so(run: RolloutRun) -> None:
    status = run_status(run)
    assert (status.held_by, status.lost, status.commits_per_hour, status.eta_s) == (None, None, None, None)
    shown = CliRunner().invoke(cli.app, ["status", run.uri])
    assert shown.exit_code == 0
    assert "results not there yet: 2.\nNobody is at work. The same `lrag-ray run` continues.\n" in shown.stdout


def test_who_works_is_named_with_its_host_and_since_when(run: RolloutRun) -> None:
    record = held(run)
    shown = CliRunner().invoke(cli.app, ["status", run.uri]).stdout
    assert f"At work: {record.user} on another (lrag-ray run, process 1) since {record.started_at}, last sign" in shown
    assert run_status(run).commits_per_hour is not None


def test_a_driver_without_a_sign_of_life_does_not_work(run: RolloutRun) -> None:
    held(run)
    beat = Path(run.uri) / "lease" / "00000001.beat"
    old = Beat.opened(beat.read_bytes()).model_copy(update={"at": "2020-01-01T00:00:00.000+00:00"})
    beat.write_bytes(old.sealed())
    status = run_status(run)
    assert status.held_by is None and status.commits_per_hour is None
    assert status.lost is not None and "on another" in status.lost
    assert "The last driver did not end properly" in CliRunner().invoke(cli.app, ["status", run.uri]).stdout


def test_a_watched_status_ends_when_the_rest_is_quarantined(run: RolloutRun, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantined(run, rollout_id("00001-bb").path)
    monkeypatch.setattr("lrag_ray.cli.app.time.sleep", lambda _: pytest.fail("it waits for what nobody does"))
    shown = CliRunner().invoke(cli.app, ["status", run.uri, "--watch"])
    assert shown.exit_code == 1
    assert "No rollout is pending; 1 quarantined." in shown.stdout and "All done" not in shown.stdout


def test_a_driver_that_retries_the_quarantined_is_watched(run: RolloutRun) -> None:
    quarantined(run, rollout_id("00001-bb").path)
    assert run_status(run).settled
    held(run)
    assert not run_status(run).settled


def test_scores_that_the_run_was_meant_to_have_are_work(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"], ["base"], [6])
    assert run_status(run).done, "a run that asks for no scores"
    run.storage.write("config.json", b'{"scoring": {"suite": "preview"}}')
    status = run_status(run)
    assert status.scores is not None and (status.scores.pending, status.done) == (1, False)
    shown = CliRunner().invoke(cli.app, ["status", run.uri]).stdout
    assert "All done" not in shown and "not there yet: 1" in shown
    (task,) = PREVIEW.pending(run)
    quarantined(run, task.name, "scoring")
    status = run_status(run)
    assert status.settled and status.exit_code == 1
    PerVideoWorker(PREVIEW, run.storage, run.storage, PREVIEW.scorer(threads=1, device="cpu")).score(
        task.payload, lambda: True
    )
    assert run_status(run).done


def test_scores_of_a_judge_whose_model_only_its_configuration_names_are_not_counted(run: RolloutRun) -> None:
    run.storage.write("config.json", b'{"scoring": {"suite": "judge", "settings": {"chat": {"model": "m"}}}}')
    shown = CliRunner().invoke(cli.app, ["status", run.uri])
    assert shown.exception is None or isinstance(shown.exception, SystemExit)
    assert "scores of the judge are not counted" in shown.stdout


def test_a_plug_in_that_a_run_names_is_reported_and_not_imported(run: RolloutRun) -> None:
    sys.modules.pop("this", None)
    run.storage.write("config.json", b'{"scoring": {"suite": "this:x"}}')
    status = run_status(run)
    assert status.scores is not None and (status.scores.suite, status.scores.pending) == ("this:x", None)
    assert "scores of the plug-in this:x are not counted" in CliRunner().invoke(cli.app, ["status", run.uri]).stdout
    assert "this" not in sys.modules


@pytest.mark.parametrize("section", ['"x"', '{"suite": 3}', '{"suite": "preview", "mode": 7}', '{"suite": "none"}'])
def test_a_scoring_section_that_means_nothing_asks_for_nothing(run: RolloutRun, section: str) -> None:
    run.storage.write("config.json", f'{{"scoring": {section}}}'.encode())
    assert run_status(run).scores is None

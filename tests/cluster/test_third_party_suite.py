"""A scoring suite from outside the package: named in a configuration, run, scored, reported; its failures recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import load_prompts
from lrag_ray.errors import ConfigError
from lrag_ray.report.collect import collect
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.stages.make import BACKBONE, METHODS, store_features

pytestmark = pytest.mark.cluster

OUTSIDE = "tests.cluster.outside_suite"
SUITE = f"{OUTSIDE}:Length"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a configuration that names the suite."""
    (tmp_path / "prompts.txt").write_text("a red fox in the snow\n")
    config = {
        "run": {"uri": str(tmp_path / "run")},
        "prompts": {"path": str(tmp_path / "prompts.txt")},
        "durations_s": [1.5, 3],
        "backbones": {"tiny": BACKBONE},
        "methods": METHODS,
        "engine": {"actors": 1},
        "scoring": {
            "suite": SUITE,
            "settings": {"factor": 3, "away": str(tmp_path / "away")},
            "during_generation": False,
            "workers": 1,
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path


def command(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code in (0, 1), done.stderr
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.usefixtures("cluster")
def test_it_runs_scores_and_reports_without_an_edit_of_the_package(folder: Path) -> None:
    run, config = RolloutRun(str(folder / "run")), load_config(folder / "config.yaml")
    store_features(config, load_prompts(config.prompts))
    (folder / "away").touch()
    code, outcome = command("run", str(folder / "config.yaml"))
    assert (code, outcome["commits_made"], outcome["videos_scored"]) == (1, 4, 2), "a score is missing: exit code 1"
    failures = run_status(run).failures
    assert {(failure.stage, failure.counted_attempts) for failure in failures} == {("scoring", 3)}
    assert [failure.reason for failure in failures] == ["RuntimeError: the judge is away"] * 2
    assert all("outside_suite.py" in failure.traceback for failure in failures)
    assert "the judge is away" in (folder / "run/summary/report.html").read_text()

    (folder / "away").unlink()
    code, outcome = command("score", run.uri, "--config", str(folder / "config.yaml"))
    assert (code, outcome["suite"], outcome["videos_scored"], outcome["failed"]) == (0, SUITE, 2, {})
    assert run_status(run).failures == [], "success clears them"
    assert len(run.storage.list_files("scores/length/1")) == 4

    data = collect([run], SUITE)
    assert data.suite.title == "length suite"
    frames = {(score.method, score.latent_frames): score.values["frames"] for score in data.scores.videos}
    assert frames == {(method, latent): 3 * shown for method in METHODS for latent, shown in ((6, 21), (12, 45))}
    code, report = command("report", run.uri, "--suite", SUITE)
    assert (code, report["suite"], len(report["blocks"])) == (0, "length", 2)
    page = (folder / "run/summary/report.html").read_text()
    assert "Frame count" in page and "length suite" in page
    # What a run names is never imported: without the option only suites of the package are looked at.
    assert collect([run]).suite.name == "preview"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scoring.settings={factr: 2}", r"scoring\.settings\.factr: unknown key; did you mean 'factor'\?"),
        ("scoring.settings={factor: many}", r"scoring\.settings\.factor: expected a whole number, got text 'many'"),
        (f"scoring.suite={OUTSIDE}:Nothing", r"scoring\.suite: suite .* has no 'Nothing'"),
        ("scoring.suite=no_such_module:Suite", r"scoring\.suite: .* cannot import 'no_such_module'"),
        (f"scoring.suite={OUTSIDE}:LengthSettings", r"scoring\.suite: .* is not a lrag_ray\.scoring\.suite\.Suite"),
        ("scoring.suite=preview", r"scoring\.settings\.factor: unknown key"),
    ],
)
def test_its_settings_and_its_name_are_checked_with_the_configuration(
    folder: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(folder / "config.yaml", [override])

"""A scoring suite from outside the package: named in a configuration, run, scored, reported; its failures recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.config.load import load_config
from lrag_ray.errors import ConfigError
from lrag_ray.report.collect import collect
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.cluster.drivers import REPOSITORY
from tests.stages.make import BACKBONE, METHODS

pytestmark = pytest.mark.cluster

MODULE = '''
"""Length of the video, times a factor."""

from dataclasses import dataclass
from pathlib import Path

from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.per_video import PerVideoSuite, frames_of


@dataclass(frozen=True)
class Settings:
    factor: int = 1


class Length(PerVideoSuite[Settings]):
    name = "length"
    Settings = Settings
    measures = (
        Measure("frames", "Frame count", "Frames times the factor", lower=0, upper=1e9, higher_is_better=True),
    )

    def scorer(self, *, threads, device):
        def score(video, target):
            if Path(__file__).with_name("broken").exists() and target.method == "rag":
                raise RuntimeError("the judge is away")
            return {"frames": self.settings.factor * sum(1 for _ in frames_of(video, target.video_frames))}

        return score
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On the import path of everything that the test starts; with a configuration."""
    (tmp_path / "outside_suite.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(tmp_path)]))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a red fox in the snow\n")
    config = {
        "run": {"uri": str(tmp_path / "run")},
        "prompts": {"path": str(tmp_path / "prompts.txt")},
        "durations_s": [1.5, 3],
        "backbones": {"tiny": BACKBONE},
        "methods": METHODS,
        "scoring": {"suite": "outside_suite:Length", "settings": {"factor": 3}, "during_generation": False},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return tmp_path


def command(*arguments: str) -> tuple[int, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "lrag_ray", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_it_runs_scores_and_reports_without_an_edit_of_the_package(folder: Path) -> None:
    run = RolloutRun(str(folder / "run"))
    (folder / "broken").touch()
    code, outcome = command("run", str(folder / "config.yaml"))
    assert (code, outcome["commits_made"], outcome["videos_scored"]) == (1, 4, 2), "a score is missing: exit code 1"
    failures = run_status(run).failures
    assert {(failure.stage, failure.counted_attempts) for failure in failures} == {("scoring", 3)}
    assert [failure.reason for failure in failures] == ["RuntimeError: the judge is away"] * 2
    assert all("outside_suite.py" in failure.traceback for failure in failures)
    assert "the judge is away" in (folder / "run/summary/report.html").read_text()

    (folder / "broken").unlink()
    code, outcome = command("score", run.uri, "--config", str(folder / "config.yaml"))
    assert (code, outcome["suite"], outcome["videos_scored"], outcome["failed"]) == (0, "outside_suite:Length", 2, {})
    assert run_status(run).failures == [], "success clears them"
    assert len(run.storage.list_files("scores/length/1")) == 4

    data = collect([run], "outside_suite:Length")
    assert data.suite.title == "length suite"
    frames = {(score.method, score.latent_frames): score.values["frames"] for score in data.scores.videos}
    assert frames == {(method, latent): 3 * shown for method in METHODS for latent, shown in ((6, 21), (12, 45))}
    code, report = command("report", run.uri, "--suite", "outside_suite:Length")
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
        ("scoring.suite=outside_suite:Nothing", r"scoring\.suite: suite .* has no 'Nothing'"),
        ("scoring.suite=no_such_module:Suite", r"scoring\.suite: .* cannot import 'no_such_module'"),
        ("scoring.suite=outside_suite:Settings", r"scoring\.suite: .* is not a lrag_ray\.scoring\.suite\.Suite"),
        ("scoring.suite=preview", r"scoring\.settings\.factor: unknown key"),
    ],
)
def test_its_settings_and_its_name_are_checked_with_the_configuration(
    folder: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(folder / "config.yaml", [override])

"""Looking around among runs on a local disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.store.seal import opened_json
from tests.report.make_run import make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, the second of which was begun like the first."""
    made = tmp_path_factory.mktemp("runs")
    make_run(str(made / "one"), ["a red fox", "a river"])
    shutil.copytree(made / "one", made / "deeper/two")
    return made


def ask(*arguments: str, code: int = 0) -> Any:
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert shown.exit_code == code, shown.output
    return json.loads(shown.stdout)


def test_runs_are_found_below_a_folder_and_a_damaged_one_hides_none(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "runs"))
    (copy / "link").symlink_to(copy / "one")
    (copy / "broken").mkdir()
    (copy / "broken/run.json").write_text("{")
    found = {run["uri"]: run for run in ask("runs", str(copy))}
    assert found.keys() == {str(copy / name) for name in ("broken", "deeper/two", "one")}
    assert "was written by another version" in found[str(copy / "broken")]["problem"]
    one = found[str(copy / "one")]
    assert (one["backbones"], one["prompts"], one["durations_s"], one["done"], one["total"]) == (
        ["tiny"],
        2,
        [1.5, 3.0],
        8,
        8,
    )
    shown = CliRunner().invoke(app, ["runs", str(copy)])
    assert "8/8 done" in " ".join(shown.stdout.split()) and "not readable" in shown.stdout
    assert ask("runs", str(tmp_path / "nothing")) == []


def test_videos_are_named_by_what_they_show(folder: Path) -> None:
    run = str(folder / "one")
    assert len(ask("videos", run)) == 8
    (video,) = ask("videos", run, "--prompt", "FOX", "--method", "rag", "--duration", "3")
    assert (video["prompt"], video["method"], video["duration_s"]) == ("a red fox", "rag", 3.0)
    assert Path(video["address"]).is_file()
    plain = CliRunner().invoke(app, ["videos", run, "--prompt", "FOX", "--method", "rag", "--duration", "3"])
    assert plain.stdout == f"{video['address']}\n"
    nothing = CliRunner().invoke(app, ["videos", run, "--prompt", "whale"])
    assert (nothing.exit_code, nothing.stdout) == (1, "") and "no video fits" in nothing.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--method", "ragg"), "the run has no such method; did you mean 'rag'?"),
        (("--backbone", "wan"), "the run has no such backbone; it has tiny"),
        (("--duration", "30"), "--duration 30: the run has 1.5, 3 s"),
    ],
)
def test_a_name_that_the_run_does_not_have_is_refused(folder: Path, option: tuple[str, str], message: str) -> None:
    shown = CliRunner().invoke(app, ["videos", str(folder / "one"), *option])
    assert shown.exit_code == 2 and message in shown.stderr


def test_equal_runs_are_equal_and_every_difference_is_named(folder: Path, tmp_path: Path) -> None:
    one, two = str(folder / "one"), Path(shutil.copytree(folder / "one", tmp_path / "two"))
    same = ask("diff", one, str(two))
    assert same["equal"] and {(cell["equal"], cell["different"]) for cell in same["cells"]} == {(2, 0)}

    identity = json.loads(opened_json((two / "run.json").read_bytes()))
    identity["seed"] = 8
    identity["methods"]["rag"]["settings"]["window"] = 7
    identity["backbones"]["tiny"]["latents"]["sha256"] = "x" * 64
    identity["prompts"]["00002-abc"] = {"index": 2, "text": "a whale"}
    (two / "run.json").write_text(json.dumps(identity))
    commit = next((two / "rollouts/tiny/base").rglob("commit-*.json"))
    record = json.loads(opened_json(commit.read_bytes()))
    commit.write_text(json.dumps({**record, "latents_digest": "0" * 64}))

    found = ask("diff", one, str(two))
    assert not found["equal"]
    assert [change["path"] for change in found["configuration"]] == ["methods.rag.window", "run.seed"]
    assert [change["path"] for change in found["weights"]] == ["backbones.tiny.sha256"]
    assert found["only_second"]["prompts"] == ["a whale"] and not any(found["only_first"].values())
    assert sum(cell["different"] for cell in found["cells"]) == 1
    text = CliRunner().invoke(app, ["diff", one, str(two)]).stdout
    assert "run.seed" in text and "a whale" in text and text.rstrip().endswith("The runs differ.")

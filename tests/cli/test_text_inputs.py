"""Texts that people hand to the commands: prompt files, overrides, manifests. What is not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lrag_ray.cli.app as cli
from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import load_prompts
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.run_dir import RunDirectory

CONFIG = """\
run: {uri: out/run}
prompts: {path: prompts.txt}
durations_s: [1.5]
backbones:
  tiny: {preset: tiny}
methods: {base: {}}
video: {enabled: false}
scoring: {suite: none}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "prompts.txt").write_text("A fox runs\nA bear sleeps\n")
    return tmp_path


def plan(*overrides: str) -> Result:
    arguments = [argument for override in overrides for argument in ("--set", override)]
    return CliRunner().invoke(cli.app, ["plan", "config.yaml", *arguments])


def planned(*overrides: str) -> dict[str, object]:
    arguments = [argument for override in overrides for argument in ("--set", override)]
    shown = CliRunner().invoke(cli.app, ["plan", "config.yaml", "--json", *arguments])
    assert shown.exit_code == 0, shown.output
    found: dict[str, object] = json.loads(shown.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.jsonl", '{"prompts": ["A fox runs", "A fox sleeps"]}\n', "one video follows one text"),
        ("prompts.json", '[\n  "A fox runs",\n  "A bear sleeps"\n]\n', "write one text a line into a .txt file"),
        ("prompts.txt", '[\n  "A fox runs",\n  "A bear sleeps"\n]\n', "the file is JSON, not one prompt a line"),
        ("prompts.csv", "text,seed\nA fox runs,1\n", "no column 'prompt'; the columns, separated by ',', are 'text'"),
        ("prompts.txt", "[0s#] A fox runs | [10s#] A fox sleeps\n", "prompt switching does not exist yet"),
    ],
)
def test_what_is_not_one_prompt_for_one_video_ends_with_2(here: Path, name: str, content: str, message: str) -> None:
    (here / name).write_text(content)
    for command in ("plan", "run"):
        shown = CliRunner().invoke(cli.app, [command, "config.yaml", "--set", f"prompts.path={name}"])
        assert shown.exit_code == 2 and message in shown.stderr, shown.output
    assert not (here / "out").exists()


@pytest.mark.parametrize(("value", "found"), [("out/a: b", "a section"), ("12", "12"), ("[a]", "a list of 1")])
def test_text_that_yaml_takes_for_something_else_is_to_be_quoted(here: Path, value: str, found: str) -> None:
    shown = CliRunner().invoke(cli.app, ["plan", "config.yaml", "--set", f"run.uri={value}"])
    assert shown.exit_code == 2
    assert f"run.uri: expected text, got {found}; put quotes around it if it is text" in shown.stderr
    assert planned(f"run.uri='{value}'")["uri"] == value


def test_a_table_is_planned_by_its_rows(here: Path) -> None:
    (here / "prompts.csv").write_text('id;prompt\n1;"A red boat\nin a storm"\n2;A fox\n')
    assert planned("prompts.path=prompts.csv")["prompts"] == 2


def test_prompts_that_are_cut_off_are_noted(here: Path) -> None:
    (here / "prompts.txt").write_text(f"{'x' * 300} A fox\n{'x' * 300} A bear\n")
    notes = planned()["notes"]
    assert notes == [
        "lines 1 and 2 are cut off at 256 tokens, the length of the text encoder: the rest has no effect",
        "lines 1 and 2 are the same text after that cut: they make the same video",
    ]


@pytest.mark.parametrize("uri", ["out/exp #2", "#2", "out/a b", "out/ü # c"])
def test_an_override_is_taken_literally(here: Path, uri: str) -> None:
    assert planned(f"run.uri={uri}")["uri"] == uri


def test_another_working_directory_is_named_with_the_fix(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    shown = CliRunner().invoke(cli.app, ["plan", "../config.yaml"])
    assert shown.exit_code == 2
    assert "'prompts.txt' is not in the working directory but beside the configuration" in shown.stderr
    assert "--set prompts.path=../prompts.txt" in shown.stderr
    fixed = CliRunner().invoke(cli.app, ["plan", "../config.yaml", "--set", "prompts.path=../prompts.txt"])
    assert fixed.exit_code == 0


def test_columns_are_kept_in_the_run_and_those_of_text_leave_it_as_it_was(here: Path) -> None:
    (here / "prompts.jsonl").write_text('{"id": 7, "prompt": "A fox runs", "reference": {"video": "a.mp4"}}\n')
    from_text = load_config("config.yaml", ["prompts.limit=1"])
    from_table = load_config("config.yaml", ["prompts.path=prompts.jsonl"])
    plain, rich = (build_identity(config, load_prompts(config.prompts)) for config in (from_text, from_table))
    (prompt_id,) = plain.prompts
    assert list(rich.prompts) == [prompt_id]
    assert rich.prompts[prompt_id].columns == {"id": 7, "reference": {"video": "a.mp4"}}
    # Earlier versions refuse keys that they do not know.
    assert json.loads(plain.model_dump_json())["prompts"][prompt_id] == {"index": 0, "text": "A fox runs"}
    run = RunDirectory("out/run")
    run.ensure(plain)
    assert run.ensure(rich).prompts == rich.prompts
    stored = run.read()
    assert isinstance(stored, RunIdentity) and stored.prompts == rich.prompts
    assert [stored.rollout_key(each, 6) for each in stored.rollouts()] == [
        plain.rollout_key(each, 6) for each in plain.rollouts()
    ]

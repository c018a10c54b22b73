from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.load import load_config


def init(*arguments: str, code: int = 0) -> str:
    shown = CliRunner().invoke(app, ["init", *arguments])
    assert shown.exit_code == code, shown.output
    return shown.stdout + shown.stderr


def test_a_first_configuration_loads_with_what_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    options = ("--backbones", "longlive", "--methods", "base, rag", "--durations", "30,60", "--gpus", "2")
    told = init(str(target), *options, "--prompts", "a 'strange' #1.txt", "--uri", "s3://bucket/run")
    assert "lrag-ray plan" in told
    config = load_config(str(target))
    assert (config.run.uri, config.prompts.path) == ("s3://bucket/run", "a 'strange' #1.txt")
    assert (list(config.methods), config.durations_s) == (["base", "rag"], [30, 60])
    assert (config.engine.actors, config.engine.gpus_per_actor, config.scoring.suite) == ("per_gpu", 1, "vbench_long")
    assert "# " in target.read_text()
    assert "exists. Fix" in init(str(target), code=2)


def test_without_options_and_terminal_it_takes_the_defaults_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    init("--gpus", "0")
    config = load_config("run.yaml")
    assert (list(config.backbones), config.run.uri, config.scoring.suite) == (["tiny"], "runs/run", "preview")
    assert config.methods["rag"].settings == {"descriptor": "avg_pool"}


def test_on_a_terminal_it_asks_again_for_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrag_ray.cli.init._on_terminal", lambda: True)
    monkeypatch.chdir(tmp_path)
    answers = ["", "mine.txt", "tiny", "base,ragg", "base,rag", "long", "5,10"]
    shown = CliRunner().invoke(app, ["init", "--gpus", "0"], input="\n".join(answers) + "\n")
    assert shown.exit_code == 0, shown.output
    assert "unknown method 'ragg'; did you mean 'rag'?" in shown.output and "durations 'long'" in shown.output
    config = load_config("run.yaml")
    assert (config.prompts.path, list(config.methods), config.durations_s) == ("mine.txt", ["base", "rag"], [5, 10])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--methods", "base,ragg"), "unknown method 'ragg'; did you mean 'rag'?"),
        (("--backbones", "self_forcin"), "unknown preset 'self_forcin'; did you mean 'self_forcing'?"),
        (("--durations", "long"), "durations 'long': give seconds with commas between"),
        (("--durations", "-1"), "must be above 0"),
        (("--uri", "s3://key:secret@bucket"), "credentials"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path, option: tuple[str, str], message: str) -> None:
    assert message in init(str(tmp_path / "x.yaml"), "--gpus", "0", *option, code=2)
    assert list(tmp_path.iterdir()) == []

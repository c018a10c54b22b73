"""The documents: links resolve, commands exist, the reference is what the schema says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer

from lrag_ray.cli.app import app
from tests.report.make_run import make_run
from tests.tiny import generate, start, tiny_transformer

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("cluster/**/*.md"),
        *ROOT.glob("lrag_ray/**/*.md"),
        *ROOT.glob("tests/**/*.md"),
    ]
)
OWN_FOLDERS = ("configs/", "docs/", "tests/", "scripts/", "jobs/", "cluster/")
"""A path below these in a command must exist; others are the reader's own."""


class Command(NamedTuple):
    """A command line in a document."""

    document: str
    line: str


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _outside_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _commands(path: Path) -> Iterator[Command]:
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*(line for block in fenced for line in block.replace("\\\n", " ").splitlines()), *inline]:
        words = line.removeprefix("$ ").strip()
        if re.match(r"(lrag-ray|make|python -m lrag_ray) [a-z-]", words):
            yield Command(_name(path), words)


COMMANDS = [command for path in DOCUMENTS for command in _commands(path)]


def _group(command: Any) -> dict[str, Any]:
    return dict(getattr(command, "commands", {}))


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_relative_links_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", _outside_code(path.read_text(encoding="utf-8")))
    missing = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            missing.append(target)
    assert not missing, f"{_name(path)} links to what is not there: {missing}"


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: f"{each.document}: {each.line[:60]}")
def test_commands_exist(command: Command) -> None:
    words = shlex.split(command.line, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in {">", "|", "&&", ";"}), len(words))]
    if words[0] == "make":
        _check_make(words[1:])
        return
    words = words[3:] if words[0] == "python" else words[1:]
    current: Any = typer.main.get_command(app)
    while _group(current) and words and not words[0].startswith("-"):
        # A table may name several commands at once: list|pull.
        names = words.pop(0).split("|")
        assert set(names) <= set(_group(current)), f"{command}: no command {names}"
        current = _group(current)[names[0]]
    options = {name for parameter in current.params for name in [*parameter.opts, *parameter.secondary_opts]}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in options | {"--help"}, f"{command}: no option {word}"
        elif word.startswith(OWN_FOLDERS):
            assert (ROOT / word).exists(), f"{command}: no file {word}"


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        assert "=" in word or word in targets, f"make has no target {word}"


def test_documents_name_commands() -> None:
    """The search above finds what it is for."""
    lines = [command.line for command in COMMANDS if command.document == "README.md"]
    assert any(line.startswith("make demo") for line in lines)
    assert any(line.startswith("lrag-ray run configs/table2.yaml") for line in lines)


def test_the_readme_is_short() -> None:
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= 1000, f"README.md has {words} words: details belong in docs/"


def test_the_configuration_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/config_reference.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_configurations_in_documents_have_known_sections(path: Path) -> None:
    """Top-level keys of YAML examples are those of the schema."""
    from lrag_ray.config.jobs import JOB_SCHEMAS

    known = {name for model in JOB_SCHEMAS.values() for name in model.model_fields} | {"weights"}
    for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        keys = set(re.findall(r"^([a-z_]+):", block, re.MULTILINE))
        assert keys <= known, f"{_name(path)}: no such section {keys - known}"


def test_the_examples_of_extending_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stage works without Ray, the loop repeats its noise, and the suite scores every video of a run."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    module = type(sys)("extending_examples")
    sys.modules[module.__name__] = module
    try:
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            exec(block, module.__dict__)
        assert "Result(made=2" in capsys.readouterr().out
        sys.modules["my_loops"] = module
        model, plain = tiny_transformer(), []
        for policy in (module.BaseOnRepeatedNoise, module.Base):
            plain.append(generate(start(model, policy), 2))
        assert torch.equal(plain[0][:, :3], plain[1][:, :3]) and not torch.equal(plain[0][:, 3:], plain[1][:, 3:])
        assert not module.CountJob.__abstractmethods__
        run = make_run(str(tmp_path / "run"), ["a red fox"], methods=("base",))
        suite = module.Brightness(module.Settings(scale=0.5))
        worker = suite.worker(run.storage, run.storage, threads=1, device="cpu")
        tasks = suite.pending(run)
        assert tasks
        for task in tasks:
            worker.score(task.payload, lambda: True)
        assert suite.pending(run) == []
    finally:
        del sys.modules[module.__name__]
        sys.modules.pop("my_loops", None)

"""The rules of the house: which package may import which, and what the science runs without."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lrag_ray"

LAYERS: list[set[str]] = [
    {"cli"},
    {"bench", "conformance"},
    {"pipelines"},
    {"engine", "stages", "watch"},
    {"chat", "report", "scoring", "store", "weights"},
    {"rollout", "training", "world"},
    {"context", "retrieval", "video"},
    {"wan"},
]
"""From top to bottom: a package imports its own layer and those below. `config` and `events` may be read by all above
the science; `errors`, `interrupts`, `plugins`, `printable`, `thread_pool` and the package root by everyone."""

SCIENCE = {"wan", "context", "retrieval", "rollout", "training", "video"}
WITHOUT_RAY = SCIENCE | {"chat", "scoring", "store", "weights", "report", "stages", "watch", "config"}
"""They work in a notebook."""
FORBIDDEN_IN_SCIENCE = {"s3fs", "fsspec", "botocore", "aiobotocore", "boto3"}
NAMES = {"lrag_ray.scoring.registry", "lrag_ray.scoring.vbench_long.names"}
"""Of scoring, configuration knows the names alone."""
BARE = {"wan", "context", "retrieval", "rollout", "training"}
"""Packages that import with torch, numpy and safetensors alone."""


def _imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def _layer(package: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


def test_every_package_has_its_place() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert packages == set().union(*LAYERS) | {"config"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    own = parts[0]
    if len(parts) == 1:
        # The package root is for everyone, and imports nothing of the house but records.
        return
    for name in _imports(path):
        pieces = name.split(".")
        if own in SCIENCE | {"scoring"}:
            assert pieces[0] not in FORBIDDEN_IN_SCIENCE, f"{own} imports {name}"
        if own in WITHOUT_RAY:
            assert pieces[0] not in {"ray", "typer"}, f"{own} imports {name}"
        everyones = {"__main__", "errors", "interrupts", "plugins", "printable", "text_file", "thread_pool"}
        if pieces[0] != "lrag_ray" or len(pieces) < 2 or pieces[1] in everyones:
            continue
        imported = pieces[1]
        if imported == "api":
            assert own == "cli", f"{own} imports {name}: the API is over all but the program"
        elif own == "config":
            assert imported in {"config", "context", "retrieval", "wan"} or name in NAMES, f"config imports {name}"
        elif own == "engine" and imported == "stages":
            assert pieces[:3] == ["lrag_ray", "stages", "spec"], f"{own} knows of work through stages.spec, not {name}"
        elif own == "stages" and imported == "engine":
            raise AssertionError(f"{own} imports {name}: what is done does not know where")
        elif imported in {"config", "events"}:
            assert own not in BARE, f"{own} imports {name}: the science knows no configuration files"
        else:
            assert _layer(own) <= _layer(imported), f"{own} imports {name}: an import never points up"


def test_the_science_imports_with_torch_numpy_and_safetensors_alone() -> None:
    """A fresh interpreter that refuses everything else that is installed beside the three and what they need."""
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for package in sorted(BARE)
        for path in sorted((PACKAGE / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    program = f"""
import sys
refused = {{"ray", "av", "diffusers", "transformers", "pydantic", "omegaconf", "yaml", "fsspec", "s3fs", "pyarrow",
            "pandas", "typer", "rich", "matplotlib", "torchvision", "ftfy", "sentencepiece", "jinja2", "scipy"}}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_thread_pools_cancel_their_queue_on_the_way_out() -> None:
    """Where a signal ends a command, `with ThreadPoolExecutor` would do all the work that is queued first."""
    own = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if "with ThreadPoolExecutor(" in p.read_text()}
    assert not own, f"use lrag_ray.thread_pool.thread_pool: {own}"


def test_no_merge_was_left_half_done() -> None:
    left = re.compile(r"^(<{7} |>{7} |={7}$)", re.MULTILINE)
    folders = ("lrag_ray", "jobs", "cluster", "configs", "docs", "scripts", "tests")
    paths = [*PACKAGE.parent.iterdir(), *(path for folder in folders for path in (PACKAGE.parent / folder).rglob("*"))]
    files = [path for path in paths if path.suffix in {".py", ".md", ".j2", ".css", ".js", ".yaml", ".toml", ".txt"}]
    assert len(files) > 500
    assert [path for path in files if left.search(path.read_text(encoding="utf-8"))] == []


def test_files_are_one_concept_long() -> None:
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500
    }
    assert not long, f"past 500 lines a file is two concepts: {long}"

"""Run directories with any content: what reads them answers with a message or leaves it out, quickly."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lrag_ray.cli import app as cli
from lrag_ray.errors import LragError
from lrag_ray.pipelines.gc import collect_garbage
from lrag_ray.pipelines.stored_config import stored_config
from lrag_ray.report.collect import collect
from lrag_ray.report.inspect import inspect_rollout
from lrag_ray.report.latex import latex_table
from lrag_ray.store.parts import BrokenPartError, read_trace
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.seal import opened_json
from lrag_ray.store.status import run_status
from tests.report.make_run import make_run

FUZZ = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    make_run(str(folder), ["a fox"], ["rag"], [6])
    (folder / "config.json").write_text('{"scoring": {"suite": "preview"}}')
    return folder


def read_all(folder: Path) -> None:
    """Everything that only reads a run."""
    run = RolloutRun(str(folder))
    for read in (
        lambda: run_status(run),
        lambda: collect_garbage(run, older_than_s=0),
        lambda: latex_table(collect([run])),
        lambda: stored_config(run.uri),
        lambda: stored_config(run.uri, decodes=True),
        lambda: inspect_rollout(str(next(folder.rglob("commit-6.json")).parent)),
    ):
        try:
            read()
        except LragError as refused:
            assert refused.exit_code in (2, 3) and str(refused)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 10**9, 2**63, 10**400]),
        st.floats(),
        st.text(max_size=10),
        st.sampled_from(["../x", "a/b", "\x1b[2J", "\ud800", "9999-12-31T00:00:00+00:00", ".foo:X", "", "NaN"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, from its top."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@pytest.mark.parametrize("name", ["run.json", "config.json", "commit-6.json", "part-00000-00006.json"])
@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_a_record_is_refused_or_left_out(made: Path, name: str, data: st.DataObject) -> None:
    (file,) = made.rglob(name)
    before = file.read_bytes()
    content = json.loads(opened_json(before))
    path = data.draw(st.sampled_from(places(content)))
    value = data.draw(JSON)
    if path:
        target = content
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value
    else:
        content = value
    try:
        file.write_text(json.dumps(content))
        read_all(made)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["run.json", "config.json", "commit-6.json", "part-00000-00006.trace.parquet"])
@FUZZ
@given(piece=st.binary(max_size=40), at=st.floats(0, 1), gone=st.integers(0, 30))
def test_any_bytes_in_a_file_are_refused_or_left_out(made: Path, name: str, piece: bytes, at: float, gone: int) -> None:
    (file,) = made.rglob(name)
    before = file.read_bytes()
    start = int(at * len(before))
    try:
        file.write_bytes(before[:start] + piece + before[start + gone :])
        read_all(made)
        if name.endswith(".parquet"):
            read_trace(file.read_bytes())
    except BrokenPartError:
        pass
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', "", "\0", "NaN", "1e999"]
)
def test_what_no_record_holds_is_refused(made: Path, tmp_path: Path, content: str) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    (run / "config.json").write_text(content)
    read_all(run)
    next(run.rglob("commit-6.json")).write_text(content)
    assert run_status(RolloutRun(str(run))).problems
    (run / "run.json").write_text(content)
    read_all(run)
    shown = CliRunner().invoke(cli.app, ["status", str(run)])
    assert shown.exit_code == 3 and "run.json is not a run of format 1" in shown.stderr


@pytest.mark.parametrize(("unit", "memory"), [(b"[],", 72), (b'{"a":1},', 240)])
def test_a_record_that_would_fill_the_memory_is_refused(tmp_path: Path, unit: bytes, memory: int) -> None:
    """A list of three bytes takes seventy as a value, and pydantic's own parser copied it into each of its errors."""
    (tmp_path / "run.json").write_bytes(b'{"prompts":[' + unit * (2**30 // memory) + b"1]}")
    began = time.monotonic()
    shown = CliRunner().invoke(cli.app, ["status", str(tmp_path)])
    assert shown.exit_code == 3 and "its values take more than 1024 MiB" in shown.stderr
    with (tmp_path / "run.json").open("r+b") as file:
        file.truncate(10**12)
    shown = CliRunner().invoke(cli.app, ["status", str(tmp_path)])
    assert shown.exit_code == 3 and "has 1,000,000,000,000 bytes, and at most 268,435,456 are read" in shown.stderr
    assert time.monotonic() - began < 30


def test_a_record_that_lacks_everything_is_refused_without_copies_of_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b'{"prompts":[' + b"[]," * 100_000 + b"1]}")
    tracemalloc.start()
    try:
        shown = CliRunner().invoke(cli.app, ["status", str(tmp_path)])
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()
    assert shown.exit_code == 3 and "is not a run of format 1" in shown.stderr


def test_a_run_that_claims_a_billion_samples_is_read_at_once(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made, tmp_path / "run"))
    content = json.loads(opened_json((run / "run.json").read_bytes()))
    (run / "run.json").write_text(json.dumps({**content, "samples": 10**9}))
    began = time.monotonic()
    read_all(run)
    (cell,) = run_status(RolloutRun(str(run))).cells
    assert (cell.done, cell.pending, cell.total) == (1, 10**9 - 1, 10**9)
    for command in (["status"], ["report"], ["gc"], ["verify", "--run"]):
        assert CliRunner().invoke(cli.app, [*command, str(run)]).exit_code in (0, 2)
    assert time.monotonic() - began < 60

"""What methods keep: a sentence each, and the frames that one block attends to."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.report import collect, report
from lrag_ray.report.methods import make_contexts, method_notes
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import make_run


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    return make_run(str(tmp_path / "run"), ["a red fox"])


def test_methods_are_explained_and_plug_ins_by_themselves(run: RolloutRun, tmp_path: Path) -> None:
    """Given plug-ins of a run that may be a stranger's, their sentences come out of run.json; nothing is imported."""
    mine = MethodIdentity(method="no.such:Mine", settings={"k": 2}, nested=True, summary="Keeps <b>all</b>.")
    silent = mine.model_copy(update={"summary": ""})
    identity = run.require()
    methods = {**identity.methods, "mine": mine, "silent": silent}
    run.storage.write("run.json", identity.model_copy(update={"methods": methods}).model_dump_json().encode())
    families = dict(method_notes(collect([run])))
    (base,), (rag,), (own, _) = families["sink"], families["retrieval"], families["other"]
    assert base.summary.startswith("Keeps the first frames") and "retrieves" in rag.summary
    assert base.settings == {"window": "6"}, "12 is the default"
    assert own == ("mine", "Keeps <b>all</b>.", {"k": "2"})
    report([run], to=str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Keeps &lt;b&gt;all&lt;/b&gt;." in page and "Not described: its class has no docstring." in page


def test_a_block_is_shown_with_what_it_attends_to(run: RolloutRun, tmp_path: Path) -> None:
    """Given 12 latent frames in blocks of 3, the block at 2.25 s begins at frame 9, where three quarters are over."""
    folder = Storage(str(tmp_path / "out"))
    (sheet,) = make_contexts(collect([run]), folder)
    assert (sheet.backbone, sheet.number, sheet.second, sheet.columns) == ("tiny", 1, 2.25, 9)
    base, rag = sheet.rows
    own = [("current", 2.25), ("current", 2.5), ("current", 2.75)]
    local = [("local", 1.5), ("local", 1.75), ("local", 2.0)]
    assert list(base.frames) == [("sink", 0.0), *local, *own]
    assert list(rag.frames) == [("sink", 0.0), ("retrieved", 0.25), ("retrieved", 0.5), *local, *own]
    assert sorted(folder.list_files()) == sorted(row.path for row in sheet.rows)
    report([run], to=folder.uri, strips=1)
    assert {row.path for row in sheet.rows} <= folder.list_files().keys(), "the page shows them"
    report([run], to=folder.uri, strips=0)
    assert not any(path.endswith(".webp") for path in folder.list_files())


def test_a_method_whose_trace_is_damaged_is_left_out(run: RolloutRun, tmp_path: Path) -> None:
    for path in run.storage.list_files("rollouts/tiny/rag"):
        if path.endswith(".trace.parquet"):
            run.storage.write(path, b"damaged")
    (sheet,) = make_contexts(collect([run]), Storage(str(tmp_path / "out")))
    assert [row.method for row in sheet.rows] == ["base"]

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lrag_ray.cli.tables import print_outcome
from lrag_ray.engine.run import RunOutcome
from lrag_ray.errors import INTERRUPTED
from lrag_ray.store.run_dir import RunDirectory
from tests.store.make import make_identity, rollout_id, store_commit


def shown(folder: Path, exit_code: int) -> str:
    run, identity = RunDirectory(str(folder / "run")), make_identity()
    run.ensure(identity)
    store_commit(run, identity, rollout_id(), 6)
    failed = (rollout_id("00001-bb"),) if exit_code == 1 else ()
    outcome = RunOutcome(
        exit_code=exit_code,
        uri=run.uri,
        commits_total=4,
        commits_made=1,
        videos_scored=0,
        failed=failed,
        seconds=75.2,
    )
    out = io.StringIO()
    print_outcome(Console(file=out, width=120, markup=False), run, outcome)
    return out.getvalue()


def test_the_end_of_a_run_says_what_was_done_and_where_it_lies(tmp_path: Path) -> None:
    text = shown(tmp_path, 0)
    assert "This start made 1 of 4 results and scored 0 videos in 1 min 15 s." in text
    for place in (
        "summary/report.html",
        "summary/ranks.csv, differences.csv, table.tex, scores.parquet",
        "rollouts/<backbone>",
    ):
        assert f"{tmp_path}/run/{place}" in text
    assert f"lrag-ray status {tmp_path}/run" in text


def test_rollouts_that_were_given_up_are_named(tmp_path: Path) -> None:
    text = shown(tmp_path, 1)
    assert "Rollouts given up; the next start tries them again (1):\n  rollouts/tiny/base/00001-bb-0\n" in text


@pytest.mark.parametrize("place", ["report.html", "ranks.csv"])
def test_an_interrupted_run_names_no_summary_that_it_has_not_written(tmp_path: Path, place: str) -> None:
    text = shown(tmp_path, INTERRUPTED)
    assert place not in text
    assert "lrag-ray status" in text

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lrag_ray.cli.output import console
from lrag_ray.cli.plan import print_plan
from lrag_ray.cli.tables import print_average_ranks, print_outcome
from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import plan_prompts
from lrag_ray.errors import INTERRUPTED, UsageError
from lrag_ray.events import CellScored
from lrag_ray.pipelines.evaluate import RunOutcome
from lrag_ray.pipelines.plan import Plan, make_plan
from lrag_ray.pipelines.speeds import Speed
from lrag_ray.store.rollouts import RolloutRun
from tests.conftest import REPOSITORY
from tests.store.make import make_identity, rollout_id, store_commit


def shown(folder: Path, exit_code: int) -> str:
    run, identity = RolloutRun(str(folder / "run")), make_identity()
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
        missing={rollout.path: "ValueError: poison" for rollout in failed},
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
        "summary/ranks.csv, differences.csv, videos.csv, table.tex, scores.parquet",
        "rollouts/<backbone>",
    ):
        assert f"{tmp_path}/run/{place}" in text
    assert f"lrag-ray status {tmp_path}/run" in text


def test_rollouts_that_were_given_up_are_named(tmp_path: Path) -> None:
    text = shown(tmp_path, 1)
    assert (
        "Could not be made; the next start retries them (1):\n  rollouts/tiny/base/00001-bb-0: ValueError: poison\n"
        in text
    )


@pytest.mark.parametrize("place", ["report.html", "ranks.csv"])
def test_an_interrupted_run_names_no_summary_that_it_has_not_written(tmp_path: Path, place: str) -> None:
    text = shown(tmp_path, INTERRUPTED)
    assert place not in text
    assert "lrag-ray status" in text


def test_the_plan_of_the_paper_is_whole_on_a_narrow_terminal() -> None:
    config = load_config(str(REPOSITORY / "configs" / "table2.yaml"), ["prompts.count=128", "prompts.path=null"])
    out = io.StringIO()
    terminal = Console(file=out, width=80, markup=False, force_terminal=True, color_system=None)
    print_plan(terminal, make_plan(config, plan_prompts(config.prompts)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    of_rag = [line.split() for line in lines if line.startswith("causal_forcing  rag ")]
    assert of_rag == [
        ["causal_forcing", "rag", "128", "61,440", "102,400", "16.55", "GB"],
        ["causal_forcing", "rag", "140.6", "TFLOP", "40.65", "TFLOP", "2.864", "EFLOP"],
        ["causal_forcing", "rag", "exact", "134.6", "GB", "22.19", "GB"],
    ]
    assert "Cells: 3 backbones x 4 methods x durations of 30, 60, 120 s = 36, 128 videos each" in " ".join(
        out.getvalue().split()
    )
    totals = [line.split() for line in lines if line.startswith("total ")]
    assert totals[0] == ["total", "1,536", "737,280", "1,228,800", "198.6", "GB"]
    at = next(i for i, line in enumerate(lines) if line.startswith("Work in all, and hours of one GPU"))
    head, operations, *hours = (line.rstrip() for line in lines[at + 1 :][:6])
    assert head.endswith("  VBench-Long, if run") and operations.split()[:3] == ["operations", "34.36", "EFLOP"]
    assert [line.split("  ")[0] for line in hours] == ["hours, H200", "hours, H100", "hours, A100", "hours, RTX 4090"]


def test_a_plan_of_cpus_speaks_of_no_gpus_until_asked() -> None:
    config = load_config(str(REPOSITORY / "configs" / "demo.yaml"), ["prompts.limit=1", "methods={base: {}}"])
    plan = make_plan(config, plan_prompts(config.prompts))

    def text(plan: Plan, **asked: Any) -> str:
        out = io.StringIO()
        print_plan(Console(file=out, width=200, markup=False), plan, **asked)
        return out.getvalue()

    on_cpus = text(plan)
    assert "GPU" not in on_cpus.replace("for a GPU with --gpu KIND", "") and "H100" not in on_cpus
    assert "Hours are not known" in on_cpus and ": 1 prompt\n" in on_cpus
    assert re.search(r"method +actor\n", on_cpus), "no column of a history that no method keeps"
    on_gpus = text(plan, gpu="H100", gpus=1)
    assert "actor (GPU)" in on_gpus and "of its GPU (tiny/base), which H100 has" in on_gpus
    assert "One GPU takes less than 0.1 hours for all of it." in on_gpus and "on 1 GPU," in on_gpus
    measured = make_plan(config, plan_prompts(config.prompts), [Speed("cpu, torch 2", "runs/x", 1, 1e4, None)])
    assert "hours of one actor" in text(measured) and "(1 rollout of runs/x)" in text(measured)
    with pytest.raises(UsageError, match=r"--gpus: the timings of runs/x are of CPUs"):
        text(measured, gpus=2)


def test_long_names_fold_and_numbers_stay_whole() -> None:
    name = "a_backbone_with_a_name_of_the_longest_kind_that_is_allowed_here"
    config = load_config(str(REPOSITORY / "configs" / "demo.yaml"), [f"backbones.{name}.preset=tiny"])
    out = io.StringIO()
    terminal = Console(file=out, width=80, markup=False, force_terminal=True, color_system=None)
    print_plan(terminal, make_plan(config, plan_prompts(config.prompts)))
    assert "\N{HORIZONTAL ELLIPSIS}" not in out.getvalue()


def test_average_ranks_of_a_job_are_a_row_per_method(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [("base", 9, 1.5), ("rag", 9, 1.25), ("base", 30, 2.0), ("rag", 30, None), ("rag", 9, 1.0)]
    cells = [CellScored("tiny", method, duration_s, 2, {}, rank) for method, duration_s, rank in ranks]
    print_average_ranks(console(), cells)
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows if row] == [
        ["method", "tiny", "9", "s", "tiny", "30", "s"], ["base", "1.50", "2.00"], ["rag", "1.00", "–"],
    ]  # fmt: skip
    print_average_ranks(console(), cells[3:4])
    assert capsys.readouterr().out == "", "nothing was compared"

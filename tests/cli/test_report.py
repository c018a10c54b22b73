"""`lrag-ray report` on real runs: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import lrag_ray.cli.app as cli
from lrag_ray.report import report
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import make_identity, make_run
from tests.report.vbench_rows import score_run, store_frozen

PROMPTS = [f"fox number {i}" for i in range(6)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    run = make_run(str(tmp_path_factory.mktemp("cli") / "run"), PROMPTS, ["base", "rag"], (12,))
    score_run(run, lambda rollout, *_: 0.9 if rollout.method == "rag" else 0.8)
    for prompt_id in run.require().prompts:
        store_frozen(run, "tiny", prompt_id, 0, 0.95)
    return run


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["report", *arguments])


def test_tables_are_printed_and_the_page_is_written_beside_the_run(run: RolloutRun) -> None:
    shown = invoke(run.uri, "--strips", "1")
    assert shown.exit_code == 0, shown.output
    for text in ("VBench-Long, compat mode", "rag − base", "+10.00▲", "[+10.00, +10.00]", "frozen", "tiny, untrained"):
        assert text in shown.output
    assert f"page: {run.uri}/summary/report.html" in shown.output
    below = next(line for line in shown.output.splitlines() if line.startswith("VBench-Long, compat mode. Paired"))
    assert below.endswith("▲ better, ▼ worse: it leaves out zero."), "one line for other programs"
    files = set(run.storage.list_files("summary"))
    names = ("report.html", "ranks.csv", "differences.csv", "drift.csv", "drift.parquet", "scores.parquet", "table.tex")
    assert {f"summary/{name}" for name in names} <= files
    assert len([path for path in files if path.endswith(".webp")]) == 4, "strips and contexts"


def test_json_holds_ranks_differences_and_the_control(run: RolloutRun, tmp_path: Path) -> None:
    shown = json.loads(invoke(run.uri, "--to", str(tmp_path), "--strips", "0", "--json").stdout)
    assert (shown["suite"], shown["mode"], shown["folder"]) == ("vbench_long", "compat", str(tmp_path))
    (block,) = shown["blocks"]
    assert [(row["method"], row["average_rank"]) for row in block["methods"]] == [("base", 2), ("rag", 1)]
    (difference,) = block["differences"]
    found = difference["measures"]["imaging_quality"]
    assert [found[name] for name in ("mean", "lower", "upper")] == pytest.approx([0.1, 0.1, 0.1])
    assert block["frozen"]["imaging_quality"] == pytest.approx(0.95)


def test_csv_and_latex_go_to_stdout_and_write_nothing(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"], ["base"])
    rows = list(csv.DictReader(io.StringIO(invoke(run.uri, "--csv").stdout)))
    assert rows == []
    assert invoke(run.uri, "--latex").stdout.startswith("% \\usepackage{booktabs,multirow,graphicx}\n")
    assert not run.storage.list_files("summary")
    assert invoke(run.uri, "--csv", "--latex").exit_code == 2


def test_the_control_is_in_the_csv_without_a_rank(run: RolloutRun) -> None:
    rows = list(csv.DictReader(io.StringIO(invoke(run.uri, "--csv").stdout)))
    assert [(row["method"], row["average_rank"], row["mode"]) for row in rows] == [
        ("base", "2.0", "compat"),
        ("rag", "1.0", "compat"),
        ("control:frozen", "", "compat"),
    ]
    assert float(rows[1]["video_mean_imaging_quality"]) == pytest.approx(0.9)


def test_a_suite_without_scores_says_so(run: RolloutRun, tmp_path: Path) -> None:
    assert invoke(run.uri, "--to", str(tmp_path), "--strips", "0").exit_code == 0
    assert (tmp_path / "drift.csv").is_file()
    made = report([run], suite="preview", to=str(tmp_path))
    assert (made.blocks, made.data.other_suites) == ([], ["vbench_long, compat mode"])
    page = (tmp_path / "report.html").read_text()
    assert "No scores yet." in page and "VBench-Long" not in page
    assert not list(tmp_path.glob("drift.*")), "curves of another suite are not left beside the page"


def test_what_is_not_scored_yet_is_counted(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"], ["base"])
    shown = invoke(run.uri, "--strips", "0").output
    assert "No scores yet (preview suite, not VBench)" in shown
    assert "Not scored in full yet: 2 videos at their durations (`lrag-ray score RUN`)" in shown


def test_a_run_that_was_not_meant_to_have_scores_misses_none(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"], ["base"])
    run.storage.write("config.json", b'{"job": "latents", "scoring": {"suite": "none"}}')
    shown = invoke(run.uri, "--strips", "0").output
    assert "Not scored, as configured" in shown and "yet" not in shown
    page = run.storage.read_bytes("summary/report.html").decode()
    assert "Not scored, as configured" in page and "No scores yet" not in page and "Not scored in full" not in page


def test_several_runs_without_a_place_print_one_table(run: RolloutRun, tmp_path: Path) -> None:
    other = make_run(str(tmp_path / "other"), PROMPTS, ["infinity_rope"], (12,))
    score_run(other, lambda *_: 0.85)
    shown = invoke(run.uri, other.uri)
    assert shown.exit_code == 0, shown.output
    assert "rag − infinity_rope" in shown.output and "--to FOLDER" in shown.output
    assert not other.storage.list_files("summary")


def test_runs_that_do_not_fit_exit_with_2_and_are_named(run: RolloutRun, tmp_path: Path) -> None:
    other = RolloutRun(str(tmp_path / "other"))
    identity = make_identity(PROMPTS, ["rag"], (12,))
    changed = MethodIdentity(method="rag", settings={"window": 12}, nested=True)
    other.ensure(identity.model_copy(update={"methods": {"rag": changed}}))
    shown = invoke(run.uri, other.uri)
    assert shown.exit_code == 2
    assert run.uri in shown.stderr and other.uri in shown.stderr and "methods.rag.settings.window" in shown.stderr
    assert invoke(run.uri, "--suite", "preview", "--mode", "direct").exit_code == 2
    untouched = {path: run.storage.read_bytes(path) for path in run.storage.list_files("summary")}
    for asked in (["--suite", "preview"], ["--mode", "direct"], ["--suite", "preview", "--csv"]):
        shown = invoke(run.uri, *asked)
        assert shown.exit_code == 2 and "but of vbench_long, compat mode" in shown.stderr
        assert "lrag-ray score RUN --suite" in shown.stderr
    left = {path: run.storage.read_bytes(path) for path in run.storage.list_files("summary")}
    assert left == untouched, "no page with scores is replaced by one without"
    assert invoke(str(tmp_path / "nothing")).exit_code == 3


def test_a_narrow_terminal_loses_no_letter_of_a_name(run: RolloutRun) -> None:
    console = Console(width=50, record=True, file=io.StringIO())
    for table in report([run], strips=0).terminal_tables():
        console.print(table)
    assert "…" not in console.export_text()

"""The LaTeX table: the paper's layout, nothing that LaTeX would trip over."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lrag_ray.report import collect
from lrag_ray.report.latex import escaped, latex_table
from lrag_ray.scoring.vbench_long.rows import DIMENSIONS
from lrag_ray.store.run_dir import RunDirectory
from tests.report.make_run import make_run
from tests.report.vbench_rows import score_run

METHODS = ["base", "infinity_rope", "rag_k-3"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = make_run(str(tmp_path_factory.mktemp("latex") / "run"), ["a red fox"], METHODS, (12, 18))
    score_run(run, lambda rollout, *_: 0.9 - 0.1 * METHODS.index(rollout.method))
    return latex_table(collect([RunDirectory(run.uri)]))


def test_rows_are_methods_within_backbones_within_durations(table: str) -> None:
    lines = [line for line in table.splitlines() if line.endswith(r"\\")]
    header, *rows = [[cell.strip() for cell in line.removesuffix(r"\\").split("&")] for line in lines]
    assert header[:3] == ["Duration", "Backbone", "Method"] and header[-1] == r"Avg. Rank $\downarrow$"
    assert header[3] == r"Subject consistency $\uparrow$"
    assert all(len(row) == 3 + len(DIMENSIONS) + 1 for row in [header, *rows])
    assert [row[0] for row in rows] == [r"\multirow{3}{*}{3 s}", "", "", r"\multirow{3}{*}{4.5 s}", "", ""]
    assert [row[1] for row in rows[:3]] == [r"\multirow{3}{*}{tiny}", "", ""]
    assert [row[2] for row in rows[:3]] == ["Base", r"$\infty$-RoPE", r"rag\_k-3"]


def test_best_is_bold_and_second_underlined_as_the_paper_prints_values(table: str) -> None:
    base, infinity, rag = [line for line in table.splitlines() if line.endswith(r"\\")][1:4]
    assert r"\textbf{90.00}" in base and r"\textbf{1.00}" in base
    assert r"\underline{80.00}" in infinity and r"\underline{2.00}" in infinity
    assert "& 70.00 &" in rag and rag.endswith(r"& 3.00 \\")


def test_environments_and_braces_close(table: str) -> None:
    body = "\n".join(line for line in table.splitlines() if not line.startswith("%"))
    opened = re.findall(r"\\begin\{([^}]*)\}", body)
    assert opened == ["table*", "tabular"] == re.findall(r"\\end\{([^}]*)\}", body)[::-1]
    bare = re.sub(r"\\[{}]", "", body)
    assert bare.count("{") == bare.count("}")
    assert [rule for rule in (r"\toprule", r"\midrule", r"\bottomrule") if rule not in body] == []
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", body)
    assert columns is not None and len(columns[1]) == 10


def test_text_cannot_act() -> None:
    nasty = "\\input{/etc/passwd} 50% & $x_1^2$ #~\n\x1b"
    shown = escaped(nasty)
    assert re.sub(r"\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\[&%$#_{}]", "", shown) == (
        "input/etc/passwd 50  x12 "
    )


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_it_compiles(table: str, tmp_path: Path) -> None:
    document = rf"\documentclass{{article}}\usepackage{{booktabs,multirow}}\begin{{document}}{table}\end{{document}}"
    (tmp_path / "table.tex").write_text(document)
    subprocess.run(["pdflatex", "-halt-on-error", "table.tex"], cwd=tmp_path, check=True, capture_output=True)

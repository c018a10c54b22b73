"""The LaTeX table: the paper's layout, nothing that LaTeX would trip over."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lrag_ray.report import collect
from lrag_ray.report.latex import escaped, latex_table
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import make_run
from tests.report.vbench_rows import score_run

METHODS = ["base", "infinity_rope", "rag_k-3"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = make_run(str(tmp_path_factory.mktemp("latex") / "run"), ["a red fox"], METHODS, (12, 18))
    score_run(run, lambda rollout, *_: 0.9 - 0.1 * METHODS.index(rollout.method))
    return latex_table(collect([RolloutRun(run.uri)]))


def test_rows_are_methods_within_backbones_within_durations(table: str) -> None:
    lines = [line for line in table.splitlines() if line.endswith(r"\\")]
    upper, header, *rows = [[cell.strip() for cell in line.removesuffix(r"\\").split("&")] for line in lines]
    assert header[:3] == ["Duration", "Backbone", "Method"]
    assert (upper[3], header[3]) == ("Subject", r"consistency $\uparrow$")
    assert (upper[-1], header[-1]) == ("Avg.", r"Rank $\downarrow$")
    assert all(len(row) == 3 + len(DIMENSION_NAMES) + 1 for row in [upper, header, *rows])
    assert [row[0] for row in rows] == [r"\multirow{3}{*}{3 s}", "", "", r"\multirow{3}{*}{4.5 s}", "", ""]
    assert [row[1] for row in rows[:3]] == [r"\multirow{3}{*}{tiny, untrained}", "", ""]
    assert [row[2] for row in rows[:3]] == ["Base", r"$\infty$-RoPE", r"rag\_k-3"]


def test_best_is_bold_and_second_underlined_as_the_paper_prints_values(table: str) -> None:
    base, infinity, rag = [line for line in table.splitlines() if line.endswith(r"\\")][2:5]
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


def test_backbones_that_share_a_label_go_by_their_names(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a red fox"], METHODS, (12,))
    score_run(run, lambda *_: 0.5)
    data = collect([run])
    backbones = {**data.identity.backbones, "tiny_2": data.identity.backbones["tiny"]}
    both = replace(data, identity=data.identity.model_copy(update={"backbones": backbones}))
    assert r"\multirow{3}{*}{tiny}" in latex_table(both)
    (caption,) = re.findall(r"\\caption\{.*", latex_table(both))
    assert "tiny, untrained." in caption, "what must be said of them is not lost"
    assert "Best bold" not in caption, "nothing is marked where all are equal"


def test_text_cannot_act() -> None:
    nasty = "\\input{/etc/passwd} 50% & $x_1^2$ #~\n\x1b"
    shown = escaped(nasty)
    assert re.sub(r"\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\[&%$#_{}]", "", shown) == (
        "input/etc/passwd 50  x12 "
    )


def compiled(body: str, folder: Path, packages: str = "booktabs,multirow,graphicx") -> str:
    """Log of a two-column paper of letter size with `body` in it."""
    document = rf"\documentclass[twocolumn]{{article}}\usepackage[margin=0.8in]{{geometry}}\usepackage{{{packages}}}"
    document += "\n\\setlength{\\textwidth}{487pt}\\begin{document}\n" + body + "\n\\end{document}\n"
    (folder / "paper.tex").write_text(document, encoding="utf-8")
    latex = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(latex, cwd=folder, check=False, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")


@needs_latex
def test_it_compiles_and_fits_a_two_column_page(table: str, tmp_path: Path) -> None:
    assert "Overfull" not in compiled(table, tmp_path)
    # Without graphicx it is not fitted, but it is there.
    compiled(table, tmp_path, "booktabs,multirow")


@needs_latex
def test_any_text_compiles(tmp_path: Path) -> None:
    texts = ["50% & x_1^2 {a} ~$#\\", "狐 🦊 лиса ثعلب é ß ő", '“a”—b--c… <i> |x| "q" `b\' ∞ ≤', "e\u0301"]
    compiled("\n\n".join(map(escaped, texts)) + rf"\section{{{escaped(texts[1])}}}", tmp_path)

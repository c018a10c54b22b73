"""Drift panels: one per dimension, every method with its own line, told in words as well."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from lrag_ray.report import ReportData, collect
from lrag_ray.report.drift_svg import drift_figures
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES
from tests.report.make_run import make_run
from tests.report.vbench_rows import score_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    run = make_run(
        str(tmp_path_factory.mktemp("drift") / "run"), [f"fox {i}" for i in range(6)], ["base", "rag"], (12, 27)
    )
    score_run(run, lambda rollout, _, first: (0.9 if rollout.method == "rag" else 0.8) - first / 500)
    return collect([run])


def test_the_longest_duration_is_drawn_with_a_line_and_a_band_per_method(data: ReportData) -> None:
    (figure,) = drift_figures(data)
    assert (figure.duration_s, figure.prompts, len(figure.panels)) == (6.75, 6, len(DIMENSION_NAMES))
    assert figure.styles == {"base": 0, "rag": 1}
    for panel in figure.panels:
        drawing = ElementTree.fromstring(str(panel.svg))
        assert [path.get("class") for path in drawing.findall("path")] == [
            "band band0", "band band1", "line line0", "line line1",
        ]  # fmt: skip
        assert [title.text for title in drawing.iter("title")] == ["base", "rag"]
        told = f"{panel.title} of clips over the time of the video: base from 80.00 to 65.40, rag from 90.00 to 75.40."
        assert drawing.get("aria-label") == told


def test_points_are_where_their_values_are(data: ReportData) -> None:
    (figure,) = drift_figures(data)
    panel = next(panel for panel in figure.panels if panel.title == "Motion smoothness")
    drawing = ElementTree.fromstring(str(panel.svg))
    ticks = {float(text.text or ""): float(text.get("y") or "") for text in drawing.findall("text[@class='y']")}
    (low, low_y), (high, high_y) = min(ticks.items()), max(ticks.items())
    line = next(path for path in drawing.findall("path") if path.get("class") == "line line1")
    points = [tuple(map(float, pair.split())) for pair in (line.get("d") or "")[1:].split("L")]
    values = [low + (y - low_y) * (high - low) / (high_y - low_y) for _, y in points]
    starts = [0, 32, 64, 73]
    assert values == pytest.approx([90 - start / 5 for start in starts], abs=0.1)
    xs = [x for x, _ in points]
    assert [(x - xs[0]) / (xs[-1] - xs[0]) for x in xs] == pytest.approx([start / 73 for start in starts], abs=0.002)


def test_a_run_without_clips_has_no_figure(tmp_path: Path) -> None:
    assert drift_figures(collect([make_run(str(tmp_path / "run"), ["a red fox"])])) == []

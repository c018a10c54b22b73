"""The inline map shows exactly the cells of the trace."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lrag_ray.context.trace import ALL_LAYERS, TraceRow
from lrag_ray.report.trace_svg import trace_figure
from tests.report.make_run import trace_rows

ROWS = [row for block in range(6) for row in trace_rows(block, retrieves=True)]
_CELL = re.compile(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z")


def painted(svg: str, name: str) -> set[tuple[int, int]]:
    """(attended frame, query frame) pairs under the paths of a class."""
    root = ET.fromstring(svg)
    height = int(root.attrib["viewBox"].split()[3])
    cells = set()
    for path in root.iter("path"):
        if path.attrib["class"] != name:
            continue
        assert _CELL.sub("", path.attrib["d"]) == ""
        for x, y, width, tall, back in (tuple(map(int, found)) for found in _CELL.findall(path.attrib["d"])):
            assert back == width
            cells |= {(height - 1 - row, column) for row in range(y, y + tall) for column in range(x, x + width)}
    return cells


@pytest.mark.parametrize("kind", ["sink", "local", "current"])
def test_every_attended_frame_is_painted_over_its_block(kind: str) -> None:
    expected = {
        (row.frame, query) for row in ROWS if row.kind == kind for query in range(3 * row.block, 3 * row.block + 3)
    }
    assert painted(trace_figure(ROWS).svg, kind) == expected


def test_retrieved_frames_are_graded_by_similarity() -> None:
    figure = trace_figure(ROWS)
    assert figure.value_range == "similarity 0.85 to 0.90"
    best = {(row.frame, 3 * row.block) for row in ROWS if row.similarity == 0.9}
    worst = {(row.frame, 3 * row.block) for row in ROWS if row.kind == "retrieved" and row.similarity != 0.9}
    assert best <= painted(figure.svg, "v4")
    assert worst <= painted(figure.svg, "v0")


def test_a_map_without_retrieval_has_no_scale() -> None:
    figure = trace_figure([row for row in ROWS if row.kind != "retrieved"])
    assert figure.value_range == ""
    assert "v0" not in figure.svg


def test_equal_similarities_do_not_divide_by_zero() -> None:
    rows = [TraceRow(0, ALL_LAYERS, "current", i, i, 4, None) for i in range(3)]
    rows += [TraceRow(1, ALL_LAYERS, "current", 3 + i, i, 4, None) for i in range(3)]
    rows += [TraceRow(1, ALL_LAYERS, "retrieved", 1, 0, 4, 0.5)]
    assert painted(trace_figure(rows).svg, "v0") == {(1, 3), (1, 4), (1, 5)}


def test_the_summary_tells_the_map() -> None:
    summary = trace_figure(ROWS).summary
    assert summary.startswith("Attended latent frames per block over 6 blocks")
    assert "1 sink, 2 retrieved, 3 local, 3 current" in summary
    assert np.all([char not in summary for char in "<>&"])

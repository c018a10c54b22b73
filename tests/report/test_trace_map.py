"""The map of a trace holds every attended frame once, and can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrag_ray.context.deep_forcing import DeepForcing
from lrag_ray.context.forcing_kv import ForcingKv, ForcingKvSettings
from lrag_ray.context.memrope import MemRope
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.context.trace import TraceRow
from lrag_ray.report.trace_map import draw_png, draw_text, trace_map
from lrag_ray.report.trace_svg import trace_figure
from tests.tiny import start, tiny_transformer


@pytest.fixture(scope="module")
def rag() -> list[TraceRow]:
    rollout = start(tiny_transformer(), Rag, RagSettings(descriptor="avg_pool"))
    return [row for result in rollout.blocks(10) for row in result.trace[0]]


@pytest.fixture(scope="module")
def deep_forcing() -> list[TraceRow]:
    return [row for result in start(tiny_transformer(), DeepForcing).blocks(8) for row in result.trace[0]]


def test_every_attended_frame_is_in_the_map(rag: list[TraceRow]) -> None:
    drawn = trace_map(rag)
    assert drawn.kinds.shape == (30, 10)
    for row in rag:
        if row.kind == "retrieved":
            assert drawn.values[row.frame, row.block] == pytest.approx(row.similarity)
        else:
            assert drawn.kinds[row.frame, row.block] >= 0
    assert np.isfinite(drawn.values).sum() == sum(row.kind == "retrieved" for row in rag)
    assert (drawn.kinds >= 0).sum() == sum(row.kind != "retrieved" for row in rag)


def test_compressed_frames_show_the_share_of_their_tokens(deep_forcing: list[TraceRow]) -> None:
    drawn = trace_map(deep_forcing)
    shares = drawn.values[np.isfinite(drawn.values)]
    assert shares.min() > 0
    assert shares.max() <= 1
    last = [row for row in deep_forcing if row.block == 7 and row.kind == "compressed"]
    assert np.nansum(drawn.values[:, 7]) == pytest.approx(sum(row.tokens for row in last) / (6 * 2))


def test_it_is_drawn(rag: list[TraceRow], tmp_path: Path) -> None:
    draw_png(rag, tmp_path / "map.png", "rag")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    lines = draw_text(rag, height=10, width=5)
    assert len(lines) == 10
    assert {len(line) for line in lines} == {5}
    assert lines[0][0][0] == "·", "the newest frames are on top and the first block has not seen them"
    assert lines[-1][0][0] != "·"


def test_rows_made_of_many_frames_are_below_frame_0(tmp_path: Path) -> None:
    rows = [row for result in start(tiny_transformer(), MemRope).blocks(6) for row in result.trace[0]]
    drawn = trace_map(rows)
    assert (drawn.kinds.shape, drawn.first_frame, drawn.frames_per_block) == ((20, 6), -2, 3)
    made = [[kind >= 0 for kind in line] for line in drawn.kinds[:2]]
    assert made == [[False] * 4 + [True] * 2] * 2, "from the first overflow on"
    assert (drawn.kinds >= 0).sum() == len(rows)
    draw_png(rows, tmp_path / "map.png", "memrope")
    assert len(draw_text(rows)) == 20
    figure = trace_figure(rows)
    assert 'viewBox="0 0 18 20"' in figure.svg and "2 memory" in figure.summary


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace is empty"):
        trace_map([])


def test_heads_count_by_their_number() -> None:
    """Given patches of half a frame in 3 of the 4 heads of two layers, the map shows the mean over all heads."""
    settings = ForcingKvSettings(1, 1, 1, 1, 1, 2, 0.33, static_heads=((0,), (1,)))
    results = list(start(tiny_transformer(), ForcingKv, settings).blocks(5))
    rows = [row for result in results for row in result.trace[0]]
    kept = [row for row in rows if row.kind == "compressed" and row.block == 4]
    assert kept and {(row.layer, row.heads) for row in kept} == {(1, (0,))}
    drawn = trace_map(rows)
    for row in kept:
        assert drawn.values[row.frame, 4] == pytest.approx(row.tokens / 6 / 2 / 2)

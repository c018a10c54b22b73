"""Addresses of videos from the page, and maps that average layers while they are read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lrag_ray.context.trace import TraceRow
from lrag_ray.report import collect, report
from lrag_ray.report.players import relative_address, rows
from lrag_ray.report.trace_svg import trace_figure
from lrag_ray.store.address import Storage
from lrag_ray.store.parts import read_trace
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from tests.report import make_run as maker
from tests.report.make_run import make_run, trace_rows


def test_addresses_are_relative_and_escaped(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "a run"))
    assert relative_address(Storage(str(tmp_path / "a run" / "summary")), run, "r/v.mp4") == "../r/v.mp4"
    assert relative_address(Storage(str(tmp_path / "out")), run, "r/v?.mp4") == "../a%20run/r/v%3F.mp4"


def test_a_bucket_reaches_itself_and_nothing_else(tmp_path: Path, s3_bucket: str) -> None:
    run = Storage(f"{s3_bucket}/exp/run")
    assert relative_address(Storage(f"{s3_bucket}/exp/run/summary"), run, "r/v.mp4") == "../r/v.mp4"
    assert relative_address(Storage(f"{s3_bucket}/both"), run, "r/v.mp4") == "../exp/run/r/v.mp4"
    assert relative_address(Storage("s3://another/both"), run, "r/v.mp4") is None
    assert relative_address(Storage(str(tmp_path)), run, "r/v.mp4") is None


def test_a_video_out_of_reach_says_where_it_is(tmp_path: Path, s3_bucket: str) -> None:
    local = make_run(str(tmp_path / "run"), ["a red fox"], ["base"])
    remote = RolloutRun(f"{s3_bucket}/players")
    for path in local.storage.list_files():
        remote.storage.write(path, local.storage.read_bytes(path))
    (row,) = rows(collect([remote]), partial(relative_address, Storage(str(tmp_path / "here"))))
    (player,) = row.players
    assert player.sources == {}
    assert player.missing.startswith("at s3://runs/players/rollouts/tiny/base/")
    assert report([remote], strips=0).folder == "s3://runs/players/summary"
    page = remote.storage.read_bytes("summary/report.html").decode()
    assert 'src="../rollouts/tiny/base/' in page and "out of this page" not in page


def test_a_browser_shows_what_lies_in_a_bucket_instead_of_saving_it(s3_bucket: str) -> None:
    run = make_run(f"{s3_bucket}/shown", ["a red fox"], ["base"])
    report([run], strips=1)
    types = {
        path.rpartition(".")[2]: run.storage.fs.info(run.storage.full(path))["ContentType"]
        for path in run.storage.list_files()
    }
    wanted = {"html": "text/html", "csv": "text/csv", "tex": "text/plain", "webp": "image/webp", "mp4": "video/mp4"}
    assert {suffix: types[suffix].partition(";")[0] for suffix in wanted} == wanted


def test_a_map_is_that_of_the_whole_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers that keep different frames: what is drawn is their mean, however it was read."""

    def per_layer(block: int, *, retrieves: bool) -> list[TraceRow]:
        shared = [row._replace(layer=layer) for row in trace_rows(block, retrieves=False) for layer in range(3)]
        kept = [TraceRow(block, layer, "compressed", layer % 2, 0, 2, None) for layer in range(3) if block > 2]
        return shared + kept

    monkeypatch.setattr(maker, "trace_rows", per_layer)
    run = make_run(str(tmp_path / "run"), ["a red fox"], ["base"])
    data = collect([run])
    (row,) = rows(data, partial(relative_address, Storage(f"{run.uri}/summary")))
    shown = data.rollouts[RolloutId(backbone="tiny", method="base", prompt_id=next(iter(data.identity.prompts)))]
    parts = shown.videos[-1].commit.trace_parts
    whole = [row for part in parts for row in read_trace(run.storage.read_bytes(part.path))]
    assert len(whole) == 3 * sum(len(trace_rows(block, retrieves=False)) for block in range(4)) + 3
    assert row.players[0].figure == trace_figure(whole)


def test_a_map_of_heads_is_that_of_the_whole_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers whose three heads keep different shares of a frame, after blocks in which all attend alike."""

    def per_head(block: int, *, retrieves: bool) -> list[TraceRow]:
        alike = trace_rows(block, retrieves=False)
        if block < 3:
            return alike
        groups = [(layer, heads) for layer in range(2) for heads in ((0, 2), (1,))]
        rows = [row._replace(layer=layer, heads=heads) for row in alike for layer, heads in groups]
        return [*rows, TraceRow(block, 1, "compressed", 1, 1, 3, None, (0, 2))]

    monkeypatch.setattr(maker, "trace_rows", per_head)
    run = make_run(str(tmp_path / "run"), ["a red fox"], ["base"])
    data = collect([run])
    (row,) = rows(data, partial(relative_address, Storage(f"{run.uri}/summary")))
    shown = data.rollouts[RolloutId(backbone="tiny", method="base", prompt_id=next(iter(data.identity.prompts)))]
    whole = [
        row for part in shown.videos[-1].commit.trace_parts for row in read_trace(run.storage.read_bytes(part.path))
    ]
    assert row.players[0].figure == trace_figure(whole)
    assert row.players[0].figure is not None
    assert row.players[0].figure.value_range == "share of tokens 0.17 to 0.17", "half a frame in 2 of 6 heads"

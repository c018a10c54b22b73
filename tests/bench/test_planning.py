from __future__ import annotations

from pathlib import Path

from lrag_ray.bench.planning import HORIZONS, bench_planning


def test_a_large_run_in_small_is_counted_right(tmp_path: Path) -> None:
    found = bench_planning(80, tmp_path)
    assert (found["rollouts"], found["cells"]) == (80, 80 * len(HORIZONS))
    assert found["done"] == found["videos"] == (80 - found["open_rollouts"]) * len(HORIZONS)
    assert 0 < found["open_rollouts"] < 16
    # Of the open rollouts about half have a part; only with --unfinished is it a leftover: three files each.
    assert found["partial"] == found["leftovers"] // 3 * len(HORIZONS) > 0
    assert found["cpu_seconds"].keys() >= {"inventory", "pending_rollouts", "run_status", "gc"}

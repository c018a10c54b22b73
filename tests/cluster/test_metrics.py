"""The metrics endpoint of a real cluster, scraped as Prometheus does, while a run is at work and after it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import httpx2
import pytest
from ray._private.services import get_node_ip_address

from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.drivers import driver, write_config
from tests.cluster.nodes import free_port, private_folder, ray_start
from tests.cluster.quiet import Gate, make_config

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(600)]

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "lrag-ray.json"


def scrape(address: str) -> Mapping[str, float]:
    """Values of our metrics by name and our own tags, without those that Ray adds."""
    found: dict[str, float] = {}
    for line in httpx2.get(address, timeout=30).text.splitlines():
        if match := re.fullmatch(r"ray_(lrag_\w+)\{(.*)\} (\S+)", line):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            own = [f"{key}={tags[key]}" for key in sorted(tags) if key[0].islower() and key in OWN]
            found[f"{match[1]}{{{','.join(own)}}}"] = float(match[3])
    return found


OWN = {"backbone", "method", "state", "stage", "kind", "duration_s", "dimension", "le"}


def test_a_run_exports_its_metrics(tmp_path: Path) -> None:
    port, metrics = free_port(), free_port()
    address = f"{get_node_ip_address()}:{port}"
    gate = Gate(tmp_path / "gate")
    config = make_config(
        tmp_path / "run",
        address,
        prompts=1,
        gates=[gate],
        methods={"a_gate_0": gate.method, "base": {"method": "base", "window": 9}},
        engine={"actors": 1},
        scoring={"suite": "preview"},
        video={"enabled": True},
        watch={"metrics": True, "metrics_linger_s": 20},
    )
    with (
        private_folder() as folder,
        ray_start(
            "--head",
            f"--port={port}",
            "--num-cpus=1",
            "--include-dashboard=false",
            f"--temp-dir={folder}",
            f"--metrics-export-port={metrics}",
            RAY_metrics_report_interval_ms="1000",
        ),
        driver(write_config(tmp_path / "config.yaml", config)) as started,
    ):
        seen: dict[str, float] = {}

        def has(name: str, value: float | None = None) -> bool:
            seen.update(scrape(f"http://{get_node_ip_address()}:{metrics}/metrics"))
            return name in seen and value in (None, seen[name])

        started.wait_until(lambda: has("lrag_rollouts{state=running}", 1))
        assert seen["lrag_blocks_planned{}"] == 32
        gate.open()
        score = "lrag_score{backbone=tiny,dimension=flicker,duration_s=12,method=base}"
        started.wait_until(lambda: has("lrag_rollouts{state=done}", 2) and has(score))
        assert seen["lrag_blocks_total{backbone=tiny,method=base}"] == 16
        assert seen["lrag_block_seconds_count{backbone=tiny,method=base}"] == 1
        assert seen["lrag_blocks_done{}"] == 32
        assert seen["lrag_videos_scored_total{}"] == 4
        assert seen["lrag_stored_bytes_total{stage=rollouts}"] == stored_bytes(config.run.uri)
        assert not any("take" in name or "prompt" in name for name in seen), "prompts must not become tags"
        assert started.wait() == 0, started.text
    shown = {name.partition("{")[0] for name in seen}
    asked = set(re.findall(r"ray_(lrag_[a-z_]+)", DASHBOARD.read_text(encoding="utf-8")))
    # No attempt failed here, so that counter does not exist yet.
    assert asked - {"lrag_failed_attempts_total"} <= shown


def stored_bytes(uri: str) -> int:
    """Sizes of the files that commits name."""
    files = {
        file.path: file.size_bytes
        for commit in RolloutRun(uri).commits()
        for file in [*commit.latent_parts, *commit.trace_parts, *([commit.video] if commit.video else [])]
    }
    return sum(files.values())

"""The pool on a cluster of several nodes, in a process of its own (see `several_nodes`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

SCENES = [
    "per_gpu_follows_nodes",
    "memory_is_shared",
    "a_draining_node_hands_its_rollout_on",
    "a_hanging_rollout_is_taken_from_its_actor",
]


def test_the_pool_follows_its_nodes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.several_nodes", *SCENES],
        cwd=Path(__file__).resolve().parents[2],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("done ")] == [f"done {s}" for s in SCENES]

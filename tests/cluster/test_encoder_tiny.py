"""``make encoder``: from prompts to a trained, measured encoder in a rag run, with a worker killed in between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.cluster
@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_the_whole_way_on_two_cores(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/encoder_tiny.py", "--root", str(tmp_path / "runs")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit_codes"] == [0, 0, 0]
    assert (found["workers_killed"], found["workers_lost"] >= 1) == (1, True)
    assert found["commits"] == 4
    measures = found["measures"]
    assert measures["ae_seq_delta"]["neighbours"] < measures["ae_only"]["neighbours"]
    assert measures["full"]["bend"] < measures["ae_seq_delta"]["bend"]

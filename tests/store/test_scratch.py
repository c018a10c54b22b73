"""Scratch folders: gone with their block, and gone after a death as soon as another worker comes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lrag_ray.store.scratch import scratch_folder
from tests.conftest import REPOSITORY

_WORKER = """
import time
from lrag_ray.store.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "video.mp4").write_bytes(b"half a video")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_worker_left_is_removed_and_a_living_one_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        dead, alive = (Path(worker.stdout.readline().strip()) for worker in workers if worker.stdout)
        workers[0].kill()
        workers[0].wait()
        assert (dead / "video.mp4").exists()
        with scratch_folder() as mine:
            assert list(mine.iterdir()) == []
            assert not dead.parent.exists()
            assert (alive / "video.mp4").exists()
        assert not mine.parent.exists()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdout:
                worker.stdout.close()

"""Scratch folders: gone with their block, and gone after a death as soon as another worker comes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lrag_ray.store.scratch import remove_orphans, scratch_folder
from tests.conftest import REPOSITORY

_WORKER = """
import time
from lrag_ray.store.scratch import remove_orphans, scratch_folder
with scratch_folder() as folder:
    (folder / "video.mp4").write_bytes(b"half a video")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("by", ["the next worker", "the next start"])
def test_what_a_killed_worker_left_is_removed_and_a_living_one_keeps_its_own(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        if by == "the next start":
            remove_orphans()
            assert not dead.parent.exists()
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


def test_folders_without_an_owner_go_once_they_are_old_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    unsigned, young, elsewhere = (tmp_path / f"lrag-scratch-{name}" for name in ("unsigned", "young", "elsewhere"))
    for folder in (unsigned, young, elsewhere):
        folder.mkdir()
    (elsewhere / "owner.json").write_text('{"host": "another", "pid": 1, "space": "a b", "started": "1"}')
    (link := tmp_path / "lrag-scratch-link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    for folder in (unsigned, elsewhere, tmp_path / "kept"):
        os.utime(folder, (0, 0))
    remove_orphans()
    assert not unsigned.exists()
    assert young.exists() and elsewhere.exists() and link.is_symlink() and (tmp_path / "kept").exists()

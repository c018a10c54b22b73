"""Folders of local clusters: what drivers that are over left behind goes at the next start, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lrag_ray.engine.local_cluster import private_folder

LEFT = {
    "lrag0000": ["r/session_1/logs/agent.log"],
    "lrag0001": [],
    "lrag0002": ["driver.lock", "r/session_1/x", "r/prom.json"],
}
KEPT = {
    "lrag-out": ["r/session_1/video.mp4"],
    "lrag0003": ["r/session_1/x", "mine.txt"],
    "lrag0004": ["r/session_1/x", "r/mine.txt"],
    "lrag0005": ["mine/session_1"],
    "lrag00060": [],
}
"""Of other programs and people, by chance with such a name."""


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder with a short path: Ray's sockets lie below it."""
    with TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_what_is_over_is_removed_and_what_is_not_rays_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(base))
    for folder, files in (LEFT | KEPT | {"lragffff": ["r/session_1/x"]}).items():
        (base / folder).mkdir()
        for file in files:
            (base / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (base / folder / file).write_text("")
        if folder != "lragffff":
            os.utime(base / folder, (0, 0))
    with private_folder() as mine:
        there = {folder.name for folder in base.iterdir()} - {mine.parent.name}
    # One that is young may be of a start that has just begun.
    assert there == {*KEPT, "lragffff"}
    assert not mine.parent.exists()

"""Folders of local clusters: what drivers that are over left behind goes at the next start, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

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


def test_what_is_over_is_removed_and_what_is_not_rays_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for folder, files in (LEFT | KEPT | {"lragffff": ["r/session_1/x"]}).items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_text("")
        if folder != "lragffff":
            os.utime(tmp_path / folder, (0, 0))
    with private_folder() as mine:
        there = {folder.name for folder in tmp_path.iterdir()} - {mine.parent.name}
    # One that is young may be of a start that has just begun.
    assert there == {*KEPT, "lragffff"}
    assert not mine.parent.exists()

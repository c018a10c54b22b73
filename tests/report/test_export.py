"""The archive of a report: it plays without the run, and holds what was asked for."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.video.mp4 import read_video
from tests.report.make_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    make_run(str(folder), ["a red fox", "a river"])
    return folder


def export(*arguments: str, code: int = 0) -> str:
    shown = CliRunner().invoke(app, ["export", *arguments])
    assert shown.exit_code == code, shown.output
    return shown.stdout + shown.stderr


def test_an_unpacked_archive_plays_every_video_without_the_run(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    told = json.loads(export(str(moved), str(tmp_path / "all.zip"), "--strips", "1", "--json"))
    shutil.rmtree(moved)
    assert (told["videos"], told["missing"]) == (8, [])
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.namelist()[0] == "report.html"
        archive.extractall(tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    linked = {address for sources in re.findall(r'src="([^"]+\.mp4)"', page) for address in [sources]}
    listed = set(re.findall(r"videos/1/[^&\"]+\.mp4", page))
    assert len(listed) == 8 and linked <= listed
    assert all(len(read_video(str(tmp_path / "out" / address))) > 20 for address in listed)
    assert all((tmp_path / "out" / name).is_file() for name in re.findall(r'src="(strips/[^"]+)"', page))
    assert "ranks.csv" in page and (tmp_path / "out/ranks.csv").is_file()


def test_the_chosen_videos_alone_are_in_it_and_equal_exports_are_equal(run: Path, tmp_path: Path) -> None:
    chosen = ("--prompt", "FOX", "--method", "rag", "--strips", "0")
    for name in ("a.zip", "b.zip"):
        assert "2 videos" in export(str(run), str(tmp_path / name), *chosen)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        videos = [name for name in archive.namelist() if name.endswith(".mp4")]
        page = archive.read("report.html").decode()
    assert len(videos) == 2 and all("/rag/" in name for name in videos)
    assert "a river" in page and "out of this page" in page


def test_a_damaged_video_is_left_out_and_named(run: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "run"))
    video = next(damaged.rglob("*.mp4"))
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 1
    video.write_bytes(content)
    told = export(str(damaged), str(tmp_path / "x.zip"), code=1)
    assert "7 videos" in told and "does not have the recorded checksum" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUN",), "give the runs and then the file to write, which ends in .zip"),
        (("RUN", "there.zip"), "there.zip exists. Fix: give another name, or remove it"),
        (("RUN", "nowhere/x.zip"), "nowhere/x.zip cannot be written: No such file or directory"),
        (("RUN", "x.zip", "--prompt", "whale"), "no video fits"),
        (("RUN", "x.zip", "--method", "raag"), "--method raag: the runs have base, rag"),
    ],
)
def test_a_mistake_writes_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.zip").touch()
    assert message in export(*(str(run) if word == "RUN" else word for word in arguments), code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["there.zip"]

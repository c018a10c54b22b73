"""Timestamp strips: the right frames, made once, and a reason where there are none."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrag_ray.report import collect, report
from lrag_ray.report.strips import COLUMNS, make_strips
from lrag_ray.scoring.preview.suite import Preview
from lrag_ray.scoring.suite import FrameMark, FrameRow, NoSettings
from lrag_ray.store.address import Storage
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import read_video
from tests.report.make_run import make_identity, make_run, score_all, store_rollout


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    return make_run(str(tmp_path / "run"), ["a red fox", "a river at dawn"])


def test_frames_stand_at_equal_steps_of_the_longest_duration(run: RolloutRun, tmp_path: Path) -> None:
    folder = Storage(str(tmp_path / "summary"))
    data = collect([run])
    (sheet,) = make_strips(data, folder, 1)
    assert sheet.seconds == ["0 s", "0.5 s", "1 s", "1.5 s", "2 s", "2.5 s", "2.75 s"]
    assert [row.method for row in sheet.rows] == ["base", "rag"]
    path = sheet.rows[0].path
    assert path is not None
    picture = np.asarray(Image.open(io.BytesIO(folder.read_bytes(path))).convert("RGBA")).astype(float)
    frames = read_video(run.storage.full(next(iter(data.rollouts.values())).videos[-1].video.path))
    width = (picture.shape[1] + 6) // COLUMNS
    for column, index in enumerate([0, 8, 16, 24, 32, 40, 44]):
        shown = picture[:, column * width : column * width + width - 6, :3]
        wanted = np.asarray(Image.fromarray(frames[index]).resize((shown.shape[1], shown.shape[0]))).astype(float)
        others = np.asarray(Image.fromarray(frames[(index + 5) % 45]).resize((shown.shape[1], shown.shape[0])))
        assert np.abs(shown - wanted).mean() < 0.5 * np.abs(shown - others).mean()


def test_a_strip_is_made_once_per_video(run: RolloutRun, tmp_path: Path) -> None:
    folder = Storage(str(tmp_path / "summary"))
    first = make_strips(collect([run]), folder, 1)
    before = {path: (tmp_path / "summary" / path).stat().st_mtime_ns for path in folder.list_files()}
    assert len(before) == 2
    again = make_strips(collect([run]), folder, 2)
    assert again[:1] == first and len(again) == 2
    after = {path: (tmp_path / "summary" / path).stat().st_mtime_ns for path in folder.list_files()}
    assert len(after) == 4 and {path: after[path] for path in before} == before


class Turns(Preview):
    def frame_rows(self, frames: int) -> list[FrameRow]:
        last = [frames - 17, frames - 9, frames - 1]
        return [FrameRow("turn 1", [0, 8, 16]), FrameRow("turn 2", last, "colour_drift")]

    def marked_frames(self, frames: int) -> list[int]:
        return [0, frames - 1]

    def frame_marks(self, pictures: Sequence[Frames], prompt: str) -> dict[str, list[FrameMark]]:
        assert (len(pictures), prompt) == (2, "a red fox") and (pictures[0] != pictures[1]).any()
        blue = np.full((60, 44, 4), (0, 0, 255, 255), np.uint8)
        return {"turn 2": [FrameMark(blue, True), FrameMark(), FrameMark(right=False), FrameMark(blue)]}


def test_a_suite_chooses_rows_of_frames_that_touch(run: RolloutRun, tmp_path: Path) -> None:
    folder = Storage(str(tmp_path / "summary"))
    data = collect([score_all(run)])
    (sheet,) = make_strips(replace(data, suite=Turns(NoSettings())), folder, 1)
    assert [(row.method, row.label) for row in sheet.rows] == [
        (method, turn) for method in ("base", "rag") for turn in ("turn 1", "turn 2")
    ]
    assert sheet.seconds == ["0 s", "0.5 s", "1 s"]
    path = sheet.rows[1].path
    value = data.scores.videos[1].values["colour_drift"]
    assert path is not None and sheet.rows[1].value == f"Colour drift {value:#.4g}"
    picture = np.asarray(Image.open(io.BytesIO(folder.read_bytes(path))).convert("RGB")).astype(float)
    frames = read_video(run.storage.full(next(iter(data.rollouts.values())).videos[-1].video.path))
    flat = np.concatenate([frames[index] for index in (-17, -9, -1)], axis=1).astype(float)
    # Compression mixes the rows where both meet.
    picture, below = picture[: len(flat)], picture[len(flat) + 4 :]
    assert picture.shape == flat.shape
    right, without, wrong, seen = np.split(below, 4, axis=1)
    read, sign = np.split(right, [right.shape[1] // 2], axis=1)
    assert all(blue[..., 2].max() > 200 and blue[..., :2].max() < 60 for blue in (read[:, :-4], seen))
    assert sign[..., 1].mean() > 2 * sign[..., 0].mean() and wrong[..., 0].max() > wrong[..., 1].max() + 50
    assert np.ptp(without.max(axis=(0, 1))) < 30 and without.max() > 100
    assert np.abs(picture - flat).mean() < 0.5 * np.abs(picture - np.roll(flat, 64, axis=1)).mean()


def test_strips_of_an_earlier_report_are_removed_and_nothing_else(run: RolloutRun, tmp_path: Path) -> None:
    out = Storage(str(tmp_path / "out"))
    report([run], to=out.uri, strips=2)
    for name in ("strips/mine.webp", "mine/" + "0" * 32 + ".webp"):
        out.write(name, b"mine")
    before = {path for path in out.list_files() if path.endswith(".webp")}
    report([run], to=out.uri, strips=1)
    left = {path for path in out.list_files() if path.endswith(".webp")}
    contexts = 2  # One picture per method, of the first prompt.
    assert (len(before), len(left)) == (4 + contexts + 2, 2 + contexts + 2) and left < before
    page = (tmp_path / "out" / "report.html").read_text()
    assert sum(path in page for path in left) == 2 + contexts


def test_prompts_with_more_methods_come_first(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity(["only base", "both"], ["base", "rag"]))
    first, second = identity.prompts
    for method, prompt_id in (("base", first), ("base", second), ("rag", second)):
        rollout = RolloutId(backbone="tiny", method=method, prompt_id=prompt_id)
        store_rollout(run, identity, rollout, [6, 12])
    sheets = make_strips(collect([run]), Storage(str(tmp_path / "out")), 2)
    assert [sheet.prompt for sheet in sheets] == ["both", "only base"]
    assert [(row.method, row.reason) for row in sheets[1].rows] == [("base", ""), ("rag", "no video yet")]


def test_a_broken_video_has_its_reason_and_no_place_of_this_machine(run: RolloutRun, tmp_path: Path) -> None:
    video = next(iter(collect([run]).rollouts.values())).videos[-1].video
    broken = b"x" * video.size_bytes
    run.storage.write(video.path, broken)
    (sheet,) = make_strips(collect([run]), Storage(str(tmp_path / "out")), 1)
    assert sheet.rows[0].path is None and sheet.rows[1].path is not None
    assert sheet.rows[0].reason.startswith(video.path) and str(tmp_path) not in sheet.rows[0].reason


def test_videos_are_read_from_a_bucket_too(run: RolloutRun, s3_bucket: str) -> None:
    remote = RolloutRun(f"{s3_bucket}/strips")
    for path in run.storage.list_files():
        remote.storage.write(path, run.storage.read_bytes(path))
    folder = Storage(f"{s3_bucket}/strips/summary")
    sheets = make_strips(collect([remote]), folder, 1)
    assert sorted(row.path or "" for row in sheets[0].rows) == sorted(folder.list_files())


def test_no_strips_where_none_are_asked_for(run: RolloutRun, tmp_path: Path) -> None:
    assert make_strips(collect([run]), Storage(str(tmp_path / "out")), 0) == []
    assert not (tmp_path / "out").exists()

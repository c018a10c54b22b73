"""``lrag-ray score FOLDER``: any videos on a real cluster, killed in the middle, named by a manifest."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.schema import StorageSection
from lrag_ray.config.videos import videos_config
from lrag_ray.pipelines.score_videos import VideoScores, score_videos
from lrag_ray.pipelines.video_list import list_videos
from lrag_ray.scoring.vbench_long.rows import RowKey, ScoreRow
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.suite import VbenchLong
from lrag_ray.scoring.vbench_long.worker import VbenchTask, VbenchWorker, stored_rows
from lrag_ray.store.address import Storage
from tests.cluster.drivers import REPOSITORY
from tests.cluster.nodes import wait_for_end
from tests.report.make_run import moving_frames
from tests.scoring.odd_videos import BROKEN, encode, make_folder
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster
# One worker: each loads its networks for seconds.
OPTIONS = ["--weights", "random", "--dimensions", "motion_smoothness", "--set", "scoring.workers=1"]
OVERRIDES = ["scoring.weights=random", "scoring.dimensions=[motion_smoothness]", "scoring.workers=1"]


def scores_of(folder: Path) -> dict[RowKey, float | None]:
    """Stored values; every one was computed once."""
    rows = stored_rows(Storage(str(folder)), "direct")
    assert set(Counter(row.key for row in rows).values()) <= {1}, "a clip was scored twice"
    return {row.key: row.score for row in rows}


@pytest.mark.usefixtures("cluster")
def test_odd_names_and_broken_files_are_told_and_the_rest_is_scored(tmp_path: Path) -> None:
    folder, to = make_folder(tmp_path / "videos"), tmp_path / "scores"
    command = ["score", str(folder), *OPTIONS, "--to", str(to), "--json"]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    told = json.loads(shown.stdout)
    assert shown.exit_code == told["exit_code"] == 1
    assert told["videos_scored"] == 8 and told["untrained"] is True
    assert set(told["failed"]) == {*BROKEN, "single.mp4"}
    assert told["failed"]["empty.mp4"] == "empty.mp4 is empty"
    assert told["failed"]["single.mp4"] == "motion_smoothness: needs three frames, the clip has 1"
    assert str(tmp_path) not in json.dumps(told["failed"])
    clips = {video["path"]: video["clips"] for video in told["videos"] if video["scores"]}
    assert clips == {
        "a/clip_0001.mp4": 2,
        "b/clip_0001.mp4": 2,
        "odd.mkv": 2,
        "short.mp4": 1,
        "ten_bit.mkv": 2,
        "variable.mkv": 2,
        "with space, ünï ∞ [x].MP4": 3,
    }
    (group,) = told["groups"]
    assert (group["videos"], group["clips"]) == (7, 14)
    means = [video["scores"]["motion_smoothness"] for video in told["videos"] if video["scores"]]
    assert group["mean_of_video_means"]["motion_smoothness"] == pytest.approx(sum(means) / 7)
    weighted = sum(clips[v["path"]] * v["scores"]["motion_smoothness"] for v in told["videos"] if v["scores"]) / 14
    assert group["mean_over_clips"]["motion_smoothness"] == pytest.approx(weighted)
    with (to / told["csv"]).open(encoding="utf-8") as table:
        assert {row["path"] for row in csv.DictReader(table)} == {video["path"] for video in told["videos"]}

    before = scores_of(to)
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert (again.exit_code, json.loads(again.stdout)["videos_scored"]) == (1, 0)
    assert scores_of(to) == before


@pytest.mark.usefixtures("cluster")
def test_a_manifest_names_methods_and_durations(tmp_path: Path) -> None:
    for name, speed in (("x_1.mp4", 0), ("x_2.mp4", 3), ("not named.mp4", 1)):
        encode(tmp_path / "videos" / name, moving_frames(24, seed=1, speed=speed), fps=4)
    lines = [
        {"path": name, "method": method, "prompt": "p", "duration_s": s}
        for name, method in (("x_1.mp4", "still"), ("x_2.mp4", "fast"), ("gone.mp4", "fast"))
        for s in (2, 6)
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = score_videos(
        str(tmp_path / "videos"),
        videos_config(OVERRIDES),
        manifest=str(tmp_path / "m.jsonl"),
        to=str(tmp_path / "scores"),
    )
    assert found.exit_code == 1
    assert found.failed == {f"gone.mp4 at {s} s": "there is no such file" for s in (2, 6)}
    assert {(g.method, g.duration_s, g.videos, g.clips) for g in found.groups} == {
        ("still", 2, 1, 1),
        ("still", 6, 1, 3),
        ("fast", 2, 1, 1),
        ("fast", 6, 1, 3),
    }
    assert {(g.method, g.duration_s): g.average_rank for g in found.groups}["still", 6] in (1.0, 2.0)
    assert len(scores_of(tmp_path / "scores")) == 6, "durations share their clips"


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 clips of four frames, in 15 files of rows."""
    folder = tmp_path_factory.mktemp("long")
    encode(folder / "long.mp4", moving_frames(240, seed=2, speed=1), fps=2)
    return folder


@pytest.fixture(scope="module")
def undisturbed(long_video: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[RowKey, Any]:
    """Without Ray, in this process."""
    to = tmp_path_factory.mktemp("scores")
    (video,) = list_videos(str(long_video), None, StorageSection()).videos
    task = VbenchTask(video.path, video.name, None, f"{video.name}@{video.stamp}", "direct/x", "rows-end.parquet")
    settings = VbenchSettings.of(videos_config(OVERRIDES).scoring)
    VbenchWorker(Storage(str(to)), None, settings).score(task, lambda: True)
    return scores_of(to)


def score(folder: Path, to: Path, *overrides: str) -> VideoScores:
    return score_videos(str(folder), videos_config([*OVERRIDES, *overrides]), to=str(to))


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return "MapWorker" in " ".join(process.cmdline())
    return False


def row_files(to: Path) -> set[Path]:
    return set(to.glob("direct/*/rows-*.parquet"))


class HeldWorker(VbenchWorker):
    """Stops behind its first file of rows until the file ``go-on`` is beside the scores."""

    def _keep(self, task: VbenchTask, rows: Sequence[ScoreRow]) -> None:
        super()._keep(task, rows)
        while not Path(self._rows.full("go-on")).exists():
            time.sleep(0.05)


class HeldVbench(VbenchLong):
    """A suite from outside the package that scores like VBench-Long."""

    name = "held_vbench"

    def worker(self, rows: Storage, videos: Storage | None, *, threads: int, device: str) -> VbenchWorker:
        return HeldWorker(rows, videos, self.settings, threads=threads, device=device)


PROGRAM = [sys.executable, "-m", "lrag_ray"]
HELD = f"{HeldVbench.__module__}:{HeldVbench.__qualname__}"


@pytest.mark.proof
@pytest.mark.usefixtures("cluster")
def test_a_killed_driver_is_continued_and_nothing_is_scored_twice(
    undisturbed: dict[RowKey, Any], long_video: Path, tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lrag_ray",
            "score",
            str(long_video),
            *OPTIONS,
            "--suite",
            HELD,
            "--to",
            str(tmp_path),
        ],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: row_files(tmp_path) or driver.poll() is not None)
        cluster = psutil.Process(driver.pid).children(recursive=True)
        workers = list(filter(is_worker, cluster))
    finally:
        driver.kill()
        driver.wait()
    assert workers
    wait_for_end(workers)
    for process in psutil.wait_procs(cluster, timeout=1)[1]:
        # Ray's own agents see later that they are alone.
        with suppress(psutil.NoSuchProcess):
            process.kill()
    committed = row_files(tmp_path)
    assert 0 < len(scores_of(tmp_path)) < len(undisturbed)

    assert score(long_video, tmp_path).exit_code == 0
    assert scores_of(tmp_path) == undisturbed
    assert committed < row_files(tmp_path)


@pytest.mark.usefixtures("cluster")
def test_a_killed_worker_is_replaced_and_goes_on_from_its_rows(
    undisturbed: dict[RowKey, Any], long_video: Path, tmp_path: Path
) -> None:
    def kill() -> None:
        try:
            wait_until(lambda: row_files(tmp_path))
            for process in filter(is_worker, psutil.Process().children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed.append(len(row_files(tmp_path)))
        finally:
            (tmp_path / "go-on").touch()

    killed: list[int] = []
    killer = threading.Thread(target=kill)
    killer.start()
    outcome = score(long_video, tmp_path, f"scoring.suite={HELD}")
    killer.join()
    assert outcome.exit_code == 0, outcome.failed
    assert set(killed) == {1}
    assert scores_of(tmp_path) == undisturbed

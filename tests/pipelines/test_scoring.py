"""Scoring on a real Ray: what is committed gets one row each, once; broken videos are told and stop nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray

from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.fan_out import ATTEMPTS, FanOut, GoOn, Item, Refused, Result, Stopped, Work, Workers
from lrag_ray.errors import ClusterError
from lrag_ray.events import Event, StageAdvanced
from lrag_ray.pipelines.scoring import score_pending, set_aside_damaged
from lrag_ray.report.collect import collect
from lrag_ray.scoring.per_video import score_target
from lrag_ray.scoring.preview.measures import MEASURES, measures
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.video_rows import VideoRow, from_parquet, to_parquet
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import committed_videos
from lrag_ray.video.mp4 import read_video
from tests.cluster.nodes import patiently
from tests.report.make_run import make_identity, make_run, preview_row, store_rollout

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    # A socket path may have 107 characters; pytest's own folders are too deep.
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        settings = {"include_dashboard": False, "log_to_driver": False, "_temp_dir": temporary}
        patiently(lambda: ray.init(address="local", num_cpus=2, **settings))
        yield
        ray.shutdown()


def config_for(run: RolloutRun) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"uri": run.uri},
            "prompts": {"path": "prompts.txt"},
            "durations_s": [1.5, 3],
            "backbones": {
                "tiny": {"weights": {"random_seed": 0}, "text_encoder": {"kind": "tiny"}, "vae": {"kind": "tiny"}}
            },
            "methods": {"base": {"method": "base"}},
        }
    )


def stored_rows(run: RolloutRun) -> dict[tuple[str, str, int], VideoRow]:
    rows = {}
    for path in run.storage.list_files(PREVIEW.folder):
        (row,) = from_parquet(run.storage.read_bytes(path), PREVIEW)
        assert path == row.target.score_path(PREVIEW)
        rows[row.target.prompt_id, row.target.method, row.target.latent_frames] = row
    return rows


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    return make_run(str(tmp_path / "run"), ["a red fox", "a river"])


@pytest.mark.usefixtures("cluster")
def test_every_committed_video_is_scored_once(run: RolloutRun) -> None:
    seen: list[Event] = []
    outcome = score_pending(run, config_for(run), seen.append)
    assert (outcome.scored, outcome.failures) == (8, {})
    assert seen == [StageAdvanced("scoring", i, 8) for i in range(1, 9)]
    rows = stored_rows(run)
    assert len(rows) == 8
    row = rows[run.require().prompts.popitem()[0], "rag", 12]
    expected = measures(read_video(Path(run.storage.full(row.target.video_path))), fps=16)
    assert row.values == pytest.approx(expected, abs=1e-6)
    assert list(row.values) == [measure.name for measure in MEASURES]
    assert row.reason is None and "torch" in row.versions


@pytest.mark.usefixtures("cluster")
def test_waves_take_only_what_is_not_scored(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity(["a red fox"], ["base", "rag"]))
    base, rag = (
        RolloutId(backbone="tiny", method=method, prompt_id=next(iter(identity.prompts))) for method in identity.methods
    )
    store_rollout(run, identity, base, [6])
    assert score_pending(run, config_for(run)).scored == 1
    store_rollout(run, identity, rag, [6, 12])
    assert score_pending(run, config_for(run)).scored == 2
    assert PREVIEW.pending_targets(run) == []


def test_a_score_file_that_cannot_be_read_is_kept_aside_and_made_again(run: RolloutRun) -> None:
    target, other = PREVIEW.pending_targets(run)[:2]
    for each in (target, other):
        content = to_parquet([preview_row(run.storage, each)], PREVIEW)
        run.storage.write(each.score_path(PREVIEW), content[:50] if each == target else content)
    damaged = collect([run]).scores.damaged
    assert damaged == [target.score_path(PREVIEW)]
    told = set_aside_damaged(run, config_for(run), damaged)
    assert list(told) == damaged and "it cannot be read; kept as " in told[damaged[0]]
    assert target in PREVIEW.pending_targets(run) and other not in PREVIEW.pending_targets(run)
    assert collect([run]).scores.damaged == []


@pytest.mark.usefixtures("cluster")
def test_a_broken_video_is_one_failed_row(run: RolloutRun) -> None:
    broken = PREVIEW.pending_targets(run)[0]
    content = run.storage.read_bytes(broken.video_path)
    # Same size, so that the commit still counts; other bytes.
    run.storage.write(broken.video_path, content[:100] + bytes(len(content) - 100))
    outcome = score_pending(run, config_for(run))
    assert outcome.scored == 7
    assert list(outcome.failures) == [f"{broken.rollout_path} at {broken.latent_frames} latent frames"]
    row = stored_rows(run)[broken.prompt_id, broken.method, broken.latent_frames]
    assert row.values == {} and row.reason is not None
    assert row.reason == f"{broken.video_path} does not have the checksum of its commit"
    assert score_pending(run, config_for(run)).scored == 0, "a broken video stays broken; it is not tried for ever"


def do(payload: str, go_on: GoOn) -> None:
    match payload:
        case "kill":
            os._exit(1)
        case "refuse":
            raise Refused("not today")
        case "bug":
            raise KeyError("token=hunter2")
        case "wait":
            while go_on():
                time.sleep(0.05)
            raise Stopped


def make() -> Work:
    return do


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("keep", [True, False], ids=["actors", "tasks"])
def test_an_item_that_kills_its_workers_or_raises_stops_nothing(keep: bool) -> None:
    payloads = ["kill", "fine", "refuse", "bug", "good"]
    found = {r.key: r for r in FanOut([Item(p, p) for p in payloads], make, Workers(2, 1), keep=keep)}
    assert set(found) == set(payloads)
    assert found["fine"] == Result("fine", "scored", "") and found["good"].state == "scored"
    assert found["refuse"] == Result("refuse", "failed", "not today")
    assert found["kill"].state == "failed" and f"died {ATTEMPTS} times" in found["kill"].reason
    assert found["bug"].reason.startswith("KeyError: 'token=***' (test_scoring.py:")


def cannot_start() -> Work:
    raise RuntimeError("no such package")


@pytest.mark.usefixtures("cluster")
def test_workers_that_cannot_start_end_the_wave() -> None:
    with pytest.raises(ClusterError, match=r"scoring workers cannot work: .*no such package"):
        list(FanOut([Item("a", "fine")], cannot_start, Workers(1, 1), keep=True))


@pytest.mark.usefixtures("cluster")
def test_a_wave_stops_when_it_is_told_to() -> None:
    fan_out = FanOut([Item(str(i), "wait") for i in range(4)], make, Workers(1, 1), keep=True)
    told = threading.Timer(2, fan_out.stop)
    told.start()
    assert [result.state for result in fan_out] == ["stopped"] * 4


def test_without_work_ray_is_not_needed(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    run.ensure(make_identity(["a red fox"], ["base"]))
    was_running = ray.is_initialized()
    assert score_pending(run, config_for(run)).scored == 0
    assert ray.is_initialized() == was_running


def test_a_later_duration_is_the_start_of_a_longer_video(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity(["a red fox"], ["base"], horizons=[12]))
    store_rollout(
        run, identity, RolloutId(backbone="tiny", method="base", prompt_id=next(iter(identity.prompts))), [12]
    )
    run.ensure(make_identity(["a red fox"], ["base"], horizons=[6, 12]))
    short, whole = map(score_target, committed_videos(run))
    assert (short.latent_frames, short.video_frames) == (6, 21)
    assert (whole.latent_frames, whole.video_frames) == (12, 45)
    assert short.video_path == whole.video_path
    video = read_video(Path(run.storage.full(short.video_path)))
    assert preview_row(run.storage, short).values == measures(video[:21], fps=16)


def test_a_bucket_is_scored_like_a_folder(run: RolloutRun) -> None:
    bucket = make_run(f"memory://{Path(run.uri).parent.name}", ["a red fox", "a river"])
    try:
        ours = [preview_row(bucket.storage, target).values for target in PREVIEW.pending_targets(bucket)[:2]]
        assert ours == [preview_row(run.storage, target).values for target in PREVIEW.pending_targets(run)[:2]]
        gone = PREVIEW.pending_targets(bucket)[0]
        bucket.storage.remove(gone.video_path)
        assert preview_row(bucket.storage, gone).reason == f"{gone.video_path} is missing"
    finally:
        bucket.storage.fs.rm(bucket.storage.root, recursive=True)


def test_a_video_that_is_shorter_than_its_commit_says_is_not_scored(run: RolloutRun) -> None:
    target = replace(PREVIEW.pending_targets(run)[0], video_frames=99)
    row = preview_row(run.storage, target)
    assert row.values == {}
    assert row.reason == f"{target.video_path} has 21 frames, its commit speaks of 99"

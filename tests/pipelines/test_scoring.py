"""Scoring on a real Ray: what is committed gets one row each, once; broken videos are recorded and stop nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import ray

from lrag_ray.config.schema import RunConfig
from lrag_ray.events import AttemptFailed, Event, StageAdvanced, TaskFinished
from lrag_ray.pipelines.scoring import RunScoring
from lrag_ray.report.collect import collect
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.per_video import score_target
from lrag_ray.scoring.preview.measures import MEASURES, measures
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.video_rows import VideoRow, from_parquet, to_parquet
from lrag_ray.stages.spec import Task
from lrag_ray.store.local_copy import DamagedVideoError
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


def scoring_of(run: RolloutRun) -> RunScoring:
    config = config_for(run)
    return RunScoring(run, config.scoring, config.engine)


def score(run: RolloutRun, seen: list[Event]) -> list[Task[Any]]:
    scoring = scoring_of(run)
    return scoring.score(scoring.pending(), seen.append)


def finished(events: list[Event]) -> int:
    return sum(isinstance(event, TaskFinished) for event in events)


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
    assert score(run, seen) == []
    assert [event for event in seen if isinstance(event, StageAdvanced)] == [
        StageAdvanced("scoring", i, 8) for i in range(1, 9)
    ]
    assert finished(seen) == 8
    rows = stored_rows(run)
    assert len(rows) == 8
    row = rows[run.require().prompts.popitem()[0], "rag", 12]
    blocks = next(iter(committed_videos(run))).frames_per_block
    expected = measures(read_video(Path(run.storage.full(row.target.video_path))), 16, blocks)
    assert row.values == pytest.approx(expected, abs=1e-6)
    assert list(row.values) == [measure.name for measure in (*MEASURES, FLOW_DISCONTINUITY)]
    assert row.reason is None and "torch" in row.versions


@pytest.mark.usefixtures("cluster")
def test_waves_take_only_what_is_not_scored(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity(["a red fox"], ["base", "rag"]))
    base, rag = (
        RolloutId(backbone="tiny", method=method, prompt_id=next(iter(identity.prompts))) for method in identity.methods
    )
    store_rollout(run, identity, base, [6])
    seen: list[Event] = []
    score(run, seen)
    assert finished(seen) == 1
    store_rollout(run, identity, rag, [6, 12])
    score(run, seen := [])
    assert finished(seen) == 2
    assert PREVIEW.pending_targets(run) == []


def test_a_score_file_that_cannot_be_read_is_kept_aside_and_made_again(run: RolloutRun) -> None:
    target, other = PREVIEW.pending_targets(run)[:2]
    for each in (target, other):
        content = to_parquet([preview_row(run.storage, each)], PREVIEW)
        run.storage.write(each.score_path(PREVIEW), content[:50] if each == target else content)
    damaged = collect([run]).scores.damaged
    assert damaged == [target.score_path(PREVIEW)]
    told = scoring_of(run).set_aside_damaged(damaged)
    assert list(told) == damaged and "it cannot be read; kept as " in told[damaged[0]]
    assert target in PREVIEW.pending_targets(run) and other not in PREVIEW.pending_targets(run)
    assert collect([run]).scores.damaged == []


@pytest.mark.usefixtures("cluster")
def test_a_broken_video_is_one_failed_row(run: RolloutRun) -> None:
    broken = PREVIEW.pending_targets(run)[0]
    content = run.storage.read_bytes(broken.video_path)
    # Same size, so that the commit still counts; other bytes.
    run.storage.write(broken.video_path, content[:100] + bytes(len(content) - 100))
    seen: list[Event] = []
    (failed,) = score(run, seen)
    assert finished(seen) == 7
    assert failed.title == f"{broken.rollout_path} at {broken.latent_frames} latent frames"
    failures = [event.failure for event in seen if isinstance(event, AttemptFailed)]
    assert {(failure.stage, failure.task, failure.kind) for failure in failures} == {
        ("scoring", failed.title, "exception")
    }
    assert [failure.quarantined for failure in failures] == [False, False, True]
    assert f"{broken.video_path} does not have the checksum of its commit. Fix: `lrag-ray run" in failures[-1].reason
    assert (broken.prompt_id, broken.method, broken.latent_frames) not in stored_rows(run)
    assert [task.title for task in scoring_of(run).pending()] == [failed.title], "once it is repaired, it is scored"


def test_without_work_ray_is_not_needed(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    run.ensure(make_identity(["a red fox"], ["base"]))
    was_running = ray.is_initialized()
    assert score(run, []) == []
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
    assert preview_row(run.storage, short).values == measures(video[:21], 16, short.frames_per_block)


def test_a_bucket_is_scored_like_a_folder(run: RolloutRun) -> None:
    bucket = make_run(f"memory://{Path(run.uri).parent.name}", ["a red fox", "a river"])
    try:
        ours = [preview_row(bucket.storage, target).values for target in PREVIEW.pending_targets(bucket)[:2]]
        assert ours == [preview_row(run.storage, target).values for target in PREVIEW.pending_targets(run)[:2]]
        gone = PREVIEW.pending_targets(bucket)[0]
        bucket.storage.remove(gone.video_path)
        with pytest.raises(DamagedVideoError, match=f"{gone.video_path} is missing. Fix: "):
            preview_row(bucket.storage, gone)
    finally:
        bucket.storage.fs.rm(bucket.storage.root, recursive=True)


def test_a_video_that_is_shorter_than_its_commit_says_is_not_scored(run: RolloutRun) -> None:
    target = replace(PREVIEW.pending_targets(run)[0], video_frames=99)
    row = preview_row(run.storage, target)
    assert row.values == {}
    assert row.reason == f"{target.video_path} has 21 frames, its commit speaks of 99"

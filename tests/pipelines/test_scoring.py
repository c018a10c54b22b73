"""What of a run is scored, and what each row holds; tests/cluster/test_scoring.py scores on a real Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from lrag_ray.config.schema import RunConfig
from lrag_ray.pipelines.scoring import RunScoring
from lrag_ray.report.collect import collect
from lrag_ray.scoring.per_video import score_target
from lrag_ray.scoring.preview.measures import measures
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.video_rows import to_parquet
from lrag_ray.store.local_copy import DamagedVideoError
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import committed_videos
from lrag_ray.video.mp4 import read_video
from tests.report.make_run import make_identity, make_run, preview_row, store_rollout


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
            "scoring": {"workers": 2},
        }
    )


def scoring_of(run: RolloutRun) -> RunScoring:
    config = config_for(run)
    return RunScoring(run, config.scoring, config.engine)


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    return make_run(str(tmp_path / "run"), ["a red fox", "a river"])


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


def test_without_work_ray_is_not_needed(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    run.ensure(make_identity(["a red fox"], ["base"]))
    was_running = ray.is_initialized()
    assert scoring_of(run).score(scoring_of(run).pending()) == []
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

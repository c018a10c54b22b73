"""VBench-Long over a run on a real cluster: shared clips, growth, controls, and nothing scored twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lrag_ray.cli.app import app
from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import ConfigError, WeightsError
from lrag_ray.events import Event, StageAdvanced
from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.pipelines.scoring import RunScoring
from lrag_ray.pipelines.stored_config import store_config
from lrag_ray.report.collect import collect
from lrag_ray.scoring.suite import ScoringTask
from lrag_ray.scoring.vbench_long.aggregate import aggregate
from lrag_ray.scoring.vbench_long.parquet import folder, frozen_folder, frozen_identity, is_untrained, rollout_folder
from lrag_ray.scoring.vbench_long.rows import RowKey, ScoreRow
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.suite import VbenchLong
from lrag_ray.scoring.vbench_long.worker import stored_rows
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import committed_videos
from tests.pipelines.test_scoring import config_for
from tests.report.make_run import make_identity, make_run, store_rollout
from tests.stages import make

pytestmark = pytest.mark.cluster
ROWS = folder("direct")
SHORT, LONG = 21, 45
"""Video frames of the two durations; a clip has 32."""


def vbench_config(run: RolloutRun, **scoring: Any) -> RunConfig:
    chosen = {"suite": "vbench_long", "weights": "random", "dimensions": ["motion_smoothness"], "workers": 1, **scoring}
    return RunConfig.model_validate({**config_for(run).model_dump(), "scoring": chosen})


def scoring_of(run: RolloutRun, config: RunConfig) -> RunScoring:
    return RunScoring(run, config.scoring, config.engine)


def pending(run: RolloutRun, config: RunConfig, *, settled: bool = False) -> list[ScoringTask]:
    return VbenchLong(VbenchSettings.of(config.scoring)).pending(run, settled=settled)


def keys_of(rows: list[ScoreRow]) -> set[RowKey]:
    keys = Counter(row.key for row in rows)
    assert set(keys.values()) <= {1}, "a clip was scored twice"
    return set(keys)


def rollout_of(run: RolloutRun, method: str) -> RolloutId:
    return RolloutId(backbone="tiny", method=method, prompt_id=next(iter(run.require().prompts)))


@pytest.mark.usefixtures("cluster")
def test_a_rollout_is_scored_from_one_file_for_all_its_durations(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a red fox"])
    config = vbench_config(run, controls=["frozen"])
    assert len(pending(run, config)) == 3
    seen: list[Event] = []
    scoring = scoring_of(run, config)
    assert scoring.score(scoring.pending(), seen.append) == []
    assert [event for event in seen if isinstance(event, StageAdvanced)] == [
        StageAdvanced("scoring", i, 3) for i in (1, 2, 3)
    ]
    rows = stored_rows(run.storage, rollout_folder("direct", rollout_of(run, "rag").path))
    assert {key[3:] for key in keys_of(rows)} == {(0, SHORT), (0, 32), (13, 32), (0, LONG)}, "the last is the flow's"
    (video,) = {row.video for row in rows}
    for duration, clips in ((SHORT, 1), (LONG, 2)):
        found = aggregate(rows, {video: duration})
        assert (len(found.clips), found.unscored) == (clips, [])
    assert all(is_untrained(row) for row in rows if row.kind != "flow")

    control = stored_rows(run.storage, frozen_folder("direct", "tiny", rollout_of(run, "base").prompt_id, 0))
    assert {(row.video, row.first_frame, row.frame_count) for row in control} == {
        (frozen_identity("tiny", rollout_of(run, "base").prompt_id, 0), first, 32) for first in (0, 32)
    }
    assert len({row.score for row in control}) == 1

    files = run.storage.list_files(ROWS)
    assert pending(run, config) == []
    assert run.storage.list_files(ROWS) == files

    more = vbench_config(run, dimensions=["motion_smoothness", "imaging_quality"])
    assert len(pending(run, more)) == 2, "a dimension that is added is scored in addition"
    with pytest.raises(ConfigError, match="holds scores of random weights"):
        scoring_of(run, vbench_config(run, weights=str(tmp_path), dimensions=["motion_smoothness"])).check()


def work_off(run: RolloutRun, config: RunConfig) -> None:
    """What a wave does, in this process."""
    worker = VbenchLong(VbenchSettings.of(config.scoring)).worker(run.storage, run.storage, threads=1, device="cpu")
    for task in pending(run, config):
        worker.score(task.payload, lambda: True)


def test_a_row_file_that_cannot_be_read_opens_its_video_again(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a red fox"])
    config = vbench_config(run)
    work_off(run, config)
    folders = [rollout_folder("direct", rollout_of(run, method).path) for method in ("base", "rag")]
    before = [keys_of(stored_rows(run.storage, folder)) for folder in folders]
    # Beside the file that says that all is there.
    run.storage.write(f"{folders[0]}/rows-0123456789abcdef.parquet", b"PAR1 and no more")
    damaged = collect([run]).scores.damaged
    assert damaged == [f"{folders[0]}/rows-0123456789abcdef.parquet"] and not pending(run, config)
    assert len(scoring_of(run, config).set_aside_damaged(damaged)) == 2
    assert [item.payload.folder for item in pending(run, config)] == folders[:1]
    work_off(run, config)
    assert [keys_of(stored_rows(run.storage, folder)) for folder in folders] == before


def test_a_run_that_grows_keeps_the_scores_of_its_shorter_durations(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity(["a red fox"], ["base"], horizons=[6]))
    store_rollout(run, identity, rollout_of(run, "base"), [6])
    config = vbench_config(run)
    work_off(run, config)
    old = stored_rows(run.storage, ROWS)[0]

    identity = run.ensure(make_identity(["a red fox"], ["base"], horizons=[6, 12]))
    assert pending(run, config, settled=True) == [], "waves wait for every duration"
    store_rollout_again(run, identity, [6, 12])
    (item,) = pending(run, config, settled=True)
    assert item.payload.durations == (LONG,)
    work_off(run, config)
    rows = stored_rows(run.storage, ROWS)
    assert {(row.video == old.video, row.first_frame, row.frame_count) for row in rows} == {
        (True, 0, SHORT),
        (False, 0, 32),
        (False, 13, 32),
        (False, 0, LONG),
    }
    assert pending(run, config) == []


def store_rollout_again(run: RolloutRun, identity: Any, horizons: list[int]) -> None:
    """The longer horizon of a rollout whose shorter one is committed."""
    commit = f"{rollout_of(run, 'base').path}/commit-6.json"
    kept = run.storage.read_bytes(commit)
    run.storage.remove(commit)
    store_rollout(run, identity, rollout_of(run, "base"), horizons)
    run.storage.write(commit, kept)


@pytest.mark.usefixtures("cluster")
def test_the_command_scores_a_run_and_tells_a_damaged_video(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a red fox", "a river"])
    store_config(run, vbench_config(run, suite="none"))
    damaged = list(committed_videos(run))[-1]
    content = run.storage.read_bytes(damaged.video.path)
    # Same size, so that the commit still counts; other bytes.
    run.storage.write(damaged.video.path, content[:100] + bytes(len(content) - 100))
    shown = command("score", run.uri, "--suite", "vbench_long", "--weights", "random")
    assert shown.exit_code == 1
    assert "This start scored 3 videos" in shown.stdout and "Motion smoothness" in shown.stdout
    assert "Without a score, or without all of them (1):" in shown.stdout
    assert "does not have the checksum of its commit" in shown.stdout
    assert (Path(run.uri) / "summary" / "report.html").is_file()
    # It is tried again: the damage is the store's, not the video's.
    run.storage.write(damaged.video.path, content)
    work_off(run, vbench_config(run))
    told = json.loads(command("score", run.uri, "--suite", "vbench_long", "--weights", "random", "--json").stdout)
    assert (told["exit_code"], told["suite"], told["mode"], told["failed"]) == (0, "vbench_long", "direct", {})


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_missing_weights_are_told_before_anything_starts(tmp_path: Path) -> None:
    scoring = {"suite": "vbench_long", "weights": str(tmp_path / "empty"), "dimensions": ["motion_smoothness"]}
    config = make.make_config(tmp_path / "run", scoring=scoring)
    with pytest.raises(WeightsError, match=r"needs files that are not here:\n  amt_s: nothing at .*empty"):
        evaluate(config, make.make_prompts("a fox"))
    assert not (tmp_path / "run").exists()

"""Scoring on a real Ray: what is committed gets one row each, once; broken videos are recorded and stop nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrag_ray.events import AttemptFailed, Event, StageAdvanced, TaskFinished
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.preview.measures import MEASURES, measures
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.video_rows import VideoRow, from_parquet
from lrag_ray.stages.spec import Task
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import committed_videos
from lrag_ray.video.mp4 import read_video
from tests.pipelines.test_scoring import scoring_of
from tests.report.make_run import make_run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


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


def test_every_committed_video_is_scored_once_and_a_broken_one_when_it_is_repaired(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a red fox", "a river"])
    broken = PREVIEW.pending_targets(run)[0]
    content = run.storage.read_bytes(broken.video_path)
    # Same size, so that the commit still counts; other bytes.
    run.storage.write(broken.video_path, content[:100] + bytes(len(content) - 100))
    seen: list[Event] = []
    (failed,) = score(run, seen)
    assert finished(seen) == 7
    assert [event for event in seen if isinstance(event, StageAdvanced)] == [
        StageAdvanced("scoring", i, 8) for i in range(1, 9)
    ]
    assert failed.title == f"{broken.rollout_path} at {broken.latent_frames} latent frames"
    failures = [event.failure for event in seen if isinstance(event, AttemptFailed)]
    assert {(failure.stage, failure.task, failure.kind) for failure in failures} == {
        ("scoring", failed.title, "exception")
    }
    assert [failure.quarantined for failure in failures] == [False, False, True]
    assert f"{broken.video_path} does not have the checksum of its commit. Fix: `lrag-ray run" in failures[-1].reason

    rows = stored_rows(run)
    assert len(rows) == 7 and (broken.prompt_id, broken.method, broken.latent_frames) not in rows
    row = rows[run.require().prompts.popitem()[0], "rag", 12]
    blocks = next(iter(committed_videos(run))).frames_per_block
    expected = measures(read_video(Path(run.storage.full(row.target.video_path))), 16, blocks)
    assert row.values == pytest.approx(expected, abs=1e-6)
    assert list(row.values) == [measure.name for measure in (*MEASURES, FLOW_DISCONTINUITY)]
    assert row.reason is None and "torch" in row.versions

    assert [task.title for task in scoring_of(run).pending()] == [failed.title]
    run.storage.write(broken.video_path, content)
    again: list[Event] = []
    assert score(run, again) == []
    assert finished(again) == 1 and len(stored_rows(run)) == 8
    assert PREVIEW.pending_targets(run) == []

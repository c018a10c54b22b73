"""Scoring beside the rollouts: on free CPUs only, reported in the driver's thread, never a reason for a run to end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.errors import StorageError
from lrag_ray.events import (
    Event,
    Notice,
    StageAdvanced,
    StageBegan,
    StageEnded,
    TaskFinished,
    TaskStarted,
    WorkerLost,
)
from lrag_ray.pipelines import waves
from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.pipelines.scoring import RunScoring
from lrag_ray.stages.spec import Result
from lrag_ray.store.rollouts import RolloutRun
from tests.stages.make import METHODS, make_config, make_prompts, store_features

WAITING = {"method": "tests.cluster.disturbed:Disturbed", "window": 9, "at_block": 1, "how": "wait"}
PROMPTS = make_prompts("a red fox in the snow")


class Recorder:
    """Keeps the events and the threads that brought them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.threads: set[threading.Thread] = set()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.threads.add(threading.current_thread())

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "FIRST_AFTER_S", 0.1)
    monkeypatch.setattr(waves, "EVERY_S", 0.1)


def scored_config(folder: Path, **methods: Any) -> Any:
    engine = {"actors": 1, "checkpoint_every_blocks": 2}
    config = make_config(
        folder, engine=engine, scoring={"suite": "preview", "workers": 1}, methods={**METHODS, **methods}
    )
    return store_features(config, PROMPTS)


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster", "often")
def test_videos_are_scored_while_rollouts_go_on_and_the_rest_at_the_end(tmp_path: Path) -> None:
    # Its rollouts last until there are scores, however quick the rollouts are and however slow the first wave.
    config, progress = scored_config(tmp_path, waiting={**WAITING, "marker": str(tmp_path / "scores")}), Recorder()
    outcome = evaluate(config, PROMPTS, listener=progress)
    assert (outcome.exit_code, outcome.videos_scored) == (0, 6)
    assert RunScoring(RolloutRun(str(tmp_path)), config.scoring, config.engine).pending() == []
    scored = [i for i, e in enumerate(progress.events) if isinstance(e, TaskFinished) and e.stage == "scoring"]
    assert len(scored) == 6
    ended = next(i for i, e in enumerate(progress.events) if isinstance(e, StageEnded) and e.stage == "rollouts")
    assert scored[0] < ended
    # What a wave was doing when the rollouts ended is finished before the rest begins.
    rest = [(i, e.total) for i, e in enumerate(progress.events) if isinstance(e, StageBegan) and e.stage == "scoring"]
    began, left = rest[0] if rest else (len(progress.events), 0)
    assert len(rest) <= 1 and left == sum(i > began for i in scored)
    assert progress.threads == {threading.current_thread()}
    assert len(RolloutRun(str(tmp_path)).storage.list_files("scores")) == 6


@pytest.mark.cluster
@pytest.mark.usefixtures("cluster", "often")
def test_an_error_of_a_wave_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, calls = tmp_path / "gate", []

    def unreachable(*_: object, **__: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            # By now the error of the first is reported.
            (gate / "open").touch()
        raise StorageError("the bucket is away")

    gate.mkdir()
    # Of the waves alone: the last one is the job's own.
    monkeypatch.setattr(waves, "RunScoring", type("Unreachable", (RunScoring,), {"score": unreachable}))
    progress = Recorder()
    config = scored_config(tmp_path / "run", waiting={**WAITING, "marker": str(gate)})
    outcome = evaluate(config, PROMPTS, listener=progress)
    assert (outcome.exit_code, outcome.videos_scored) == (0, 6)
    told = [event.text for event in progress.of(Notice) if "bucket" in event.text]
    assert told == ["videos cannot be scored yet: the bucket is away"]


def started(task: str, worker: str) -> TaskStarted:
    return TaskStarted("rollouts", task, "a", worker)


def test_room_is_kept_for_actors_that_were_lost_or_are_between_two_rollouts() -> None:
    watch = waves.RolloutWatch()
    assert (watch.absent, watch.began_s) == (0, None)
    for worker, method in (("worker-0", "base"), ("worker-1", "rag")):
        watch.take(started(method, worker))
    assert watch.absent == 0 and watch.began_s is not None
    watch.take(WorkerLost("worker-0", "gone"))
    assert watch.absent == 1
    watch.take(started("base", "worker-2"))
    assert watch.absent == 0
    watch.take(TaskFinished("rollouts", "rag", Result()))
    watch.take(StageAdvanced("rollouts", 1, 3))
    assert watch.absent == 1
    watch.take(StageAdvanced("rollouts", 2, 3))
    assert watch.absent == 0, "the last rollout needs one actor"

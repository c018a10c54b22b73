from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrag_ray.config.schema import StorageSection
from lrag_ray.engine.pool import AttemptFailure
from lrag_ray.engine.queue import WorkItem
from lrag_ray.errors import StorageError
from lrag_ray.events import AttemptFailed, Event, Notice, StageAdvanced
from lrag_ray.pipelines import rollouts as module
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.stages.rollout.pending import open_work
from lrag_ray.store.run_dir import RunDirectory
from tests.stages.make import METHODS, make_config, make_prompts

FAILURE = AttemptFailure("exception", True, 3, True, "ValueError: poison", "Traceback …")


class Scene:
    """A run whose failures cannot be written: a file is where their folder would be."""

    def __init__(self, folder: Path) -> None:
        self.config = make_config(folder)
        self.run = RunDirectory(str(folder))
        identity = self.run.ensure(build_identity(self.config, make_prompts("a red fox")))
        self.items = open_work(identity, self.run.inventory()).items
        self.events: list[Event] = []
        no_board: Any = None
        self.listener = module._Listener(self.run, self.config.engine, no_board, len(self.items), self.events.append)
        self.in_the_way = folder / "failures"
        self.in_the_way.write_text("no folder")

    def fail(self, item: WorkItem[Any], attempt: str) -> None:
        self.listener.failed(item, attempt, FAILURE)

    def warnings(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice) and event.warning]


def test_failures_that_cannot_be_written_are_kept_and_written_later(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for number, item in enumerate(scene.items):
        scene.fail(item, f"attempt-{number}")
    assert len([event for event in scene.events if isinstance(event, AttemptFailed)]) == len(scene.items)
    assert scene.events.count(StageAdvanced("rollouts", 1, 2)) == 1
    # Not asked again with every failure: each try takes storage's own retries.
    (warning,) = scene.warnings()
    assert "1 failures are not written down yet" in warning and "failures" in warning
    scene.in_the_way.unlink()
    scene.listener.write_failures(force=True)
    assert {record.attempt for record in scene.run.failures()[0]} == {"attempt-0", "attempt-1"}


def test_a_store_that_stays_away_ends_the_run_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path)
    scene.fail(scene.items[0], "first")
    monkeypatch.setattr(module, "UNWRITTEN_FOR_S", -1.0)
    scene.listener._write_after = 0.0
    with pytest.raises(StorageError, match="cannot write"):
        scene.listener.write_failures()


def test_progress_that_cannot_be_read_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket whose server is gone: nothing listens on port 9."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    scene = Scene(tmp_path)
    assert scene.listener.progress_of(scene.items[0]) == 0
    options = StorageSection(endpoint_url="http://127.0.0.1:9", attempts=1, connect_timeout_s=1)
    scene.listener._run = RunDirectory("s3://gone/run", options)
    assert scene.listener.progress_of(scene.items[0]) is None
    assert "how far it is cannot be read" in scene.warnings()[-1]


def test_items_reserve_what_their_histories_need(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    needs = {item.payload.rollout.method: item.memory for item in module._with_memory(scene.config, scene.items)}
    # K and V of two layers, 2 x 3 tokens of 24 channels, float32; of 12 frames the window keeps 9 until the end.
    frame = 2 * 2 * 6 * 24 * 4
    assert needs["base"] == 0
    assert needs["rag"] > 0 and needs["rag"] % frame == 0
    assert set(METHODS) == set(needs)

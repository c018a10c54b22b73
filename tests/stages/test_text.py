"""The text stage in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lrag_ray.errors import ClusterError
from lrag_ray.stages.spec import LocalHost, Result, Task, Yielded
from lrag_ray.stages.text import TextStage, TextTask
from lrag_ray.store.address import Storage
from lrag_ray.store.embeddings import embedding_path, read_embedding, without_features
from lrag_ray.store.records import FailureKind, FailureRecord, new_attempt_id, now_utc
from lrag_ray.wan.text import tiny_text_encoder
from tests.stages.make import make_config

DIGEST = "ab" * 32
FOX, RIVER = "a red fox", "a river"


def stage_of(folder: Path) -> TextStage:
    config = make_config(folder)
    return TextStage(Storage(str(folder)), config.backbones, config.engine)


def test_a_prompt_is_encoded_once_and_read_back_as_the_encoder_made_it(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    task = Task("fox", TextTask("tiny", DIGEST, FOX))
    assert without_features(stage.storage, DIGEST, [FOX, RIVER]) == [FOX, RIVER] and stage.progress(task) == 0
    assert stage.open(LocalHost()).work(task.payload, new_attempt_id()) == Result()
    assert without_features(stage.storage, DIGEST, [FOX, RIVER]) == [RIVER] and stage.progress(task) == 1
    rows = read_embedding(stage.storage, DIGEST, FOX)
    assert rows is not None and torch.equal(rows, tiny_text_encoder(8, 8).encode([FOX])[0])


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_damaged_features_are_missing(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    stage = stage_of(tmp_path)
    stage.open(LocalHost()).work(TextTask("tiny", DIGEST, FOX), new_attempt_id())
    path = tmp_path / embedding_path(DIGEST, FOX)
    path.write_bytes(damage(path.read_bytes()))
    assert read_embedding(stage.storage, DIGEST, FOX) is None
    assert without_features(stage.storage, DIGEST, [FOX]) == [FOX]


def test_a_worker_on_a_draining_node_yields_before_it_loads_anything(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    outcome = stage.open(LocalHost(must_leave=lambda: True)).work(TextTask("tiny", DIGEST, FOX), new_attempt_id())
    assert isinstance(outcome, Yielded) and stage.storage.list_files() == {}


@pytest.mark.parametrize(("kind", "ends"), [("death", True), ("out_of_memory", True), ("exception", False)])
def test_what_every_prompt_would_meet_ends_the_stage(tmp_path: Path, kind: FailureKind, ends: bool) -> None:
    failure = FailureRecord(
        stage="text",
        task="prompt 00000-aa of tiny",
        attempt="a",
        kind=kind,
        counted=True,
        counted_attempts=3,
        quarantined=True,
        reason="MemoryError",
        traceback="",
        created_at=now_utc(),
    )
    error = stage_of(tmp_path).ends_with(failure)
    assert isinstance(error, ClusterError) == ends
    if ends:
        assert str(error) == "the prompts cannot be encoded: MemoryError. The same command continues"

"""Limits of Ray Train that come from the environment."""

from __future__ import annotations

import os
from typing import Any

import pytest

from lrag_ray.config.training import TrainingEngineSection
from lrag_ray.engine import train

COLLECTIVE, START = "RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_own_limits", {})
    for name in (COLLECTIVE, START):
        # So that what a test sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def limits(**engine: Any) -> tuple[float, float]:
    train._set_limits(TrainingEngineSection.model_validate(engine))
    return float(os.environ[COLLECTIVE]), float(os.environ[START])


def test_each_training_of_a_process_has_its_own_limits() -> None:
    assert limits(actors=2, stall_timeout_s=100, start_timeout_s=200) == (100, 200)
    assert limits(actors=2, stall_timeout_s=300, start_timeout_s=400) == (300, 400)


@pytest.mark.parametrize("engine", [{"actors": {"min": 1, "max": 4}}, {"actors": "per_gpu", "gpus_per_actor": 1}])
def test_an_elastic_group_does_not_wait_long_for_a_node_that_was_lost(engine: dict[str, Any]) -> None:
    """Ray Train would ask for the number of workers that the cluster had before, until the timeout."""
    assert limits(**engine)[1] == 30
    assert limits(**engine, start_timeout_s=5)[1] == 5


def test_what_the_user_set_in_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(START, "7")
    assert limits(actors=2, stall_timeout_s=100) == (100, 7)
    assert limits(actors=2, stall_timeout_s=300) == (300, 7)

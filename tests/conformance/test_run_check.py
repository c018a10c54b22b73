"""`verify --run` on run directories with real rollouts of base and ∞-RoPE."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.conformance.run_check import check_run
from lrag_ray.context.base import BaseSettings
from lrag_ray.context.registry import policy_class
from lrag_ray.errors import UsageError
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.parts import FinishedBlock, write_part
from lrag_ray.store.records import Commit, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from tests.store.make import make_identity
from tests.tiny import start, tiny_transformer

SETTINGS = {"window": 7, "sink": 1}
"""Blocks of 3: the window is full after 6 frames."""


def store(run: RolloutRun, method: str, blocks: int, *, made_by: str | None = None, seed: int = 0) -> None:
    """Generate a rollout with `made_by` and commit it under `method`."""
    rollout = start(tiny_transformer(), policy_class(made_by or method), BaseSettings(**SETTINGS), seed=seed)
    finished = [FinishedBlock(r.block, r.latents[0], r.trace[0], r.state[0]) for r in rollout.blocks(blocks)]
    identity = run.require()
    for prompt_id in identity.prompts:
        at = RolloutId(backbone="tiny", method=method, prompt_id=prompt_id)
        key = identity.rollout_key(at, blocks * 3)
        part = write_part(run.storage, f"{at.path}/attempt-one", finished, rollout_key=key, device_kind="cpu")
        record = Commit(
            rollout=at, rollout_key=key, latent_frames=blocks * 3, attempt="one", latent_parts=[part.latents],
            trace_parts=[part.trace], video=None, video_frames=0, fps=16, latents_digest="", device_kind="cpu",
            versions={}, timings_s={}, created_at=now_utc(),
        )  # fmt: skip
        assert run.commit(record)


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    methods = {name: MethodIdentity(method=name, settings=SETTINGS, nested=True) for name in ("base", "infinity_rope")}
    directory = RolloutRun(str(tmp_path / "run"))
    directory.ensure(make_identity(methods=methods))
    return directory


def test_twins_are_equal_until_the_window_is_full(run: RolloutRun) -> None:
    store(run, "base", 4)
    store(run, "infinity_rope", 4)
    rows = check_run(run.uri)
    assert [row.status for row in rows] == ["pass", "pass"]
    assert rows[0].reason == "equal up to latent frame 5, different after"


def test_short_rollouts_say_that_the_window_never_filled(run: RolloutRun) -> None:
    store(run, "base", 4)
    store(run, "infinity_rope", 2)
    assert "none is behind a full window" in check_run(run.uri)[0].reason


def test_a_method_under_the_wrong_name_is_found(run: RolloutRun) -> None:
    store(run, "base", 4)
    store(run, "infinity_rope", 4, made_by="base")
    rows = check_run(run.uri)
    assert {row.status for row in rows} == {"fail"}
    assert "are equal although the window is full" in rows[0].reason


def test_unequal_noise_is_found(run: RolloutRun) -> None:
    store(run, "base", 4)
    store(run, "infinity_rope", 4, seed=1)
    assert "differ although the window is not full" in check_run(run.uri)[0].reason


def test_a_run_without_the_pair_is_refused(tmp_path: Path) -> None:
    directory = RolloutRun(str(tmp_path / "run"))
    directory.ensure(make_identity())
    with pytest.raises(UsageError, match="no base and infinity_rope setting with equal window and sink"):
        check_run(directory.uri)

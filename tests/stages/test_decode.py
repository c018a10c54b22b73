"""The decode stage in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrag_ray.stages.backbone import pixels_identity
from lrag_ray.stages.decode import DecodeStage, DecodeTask
from lrag_ray.stages.spec import LocalHost, Refused, Result, Task, WorkerState, Yielded
from lrag_ray.store.decoded import decode_settings
from lrag_ray.store.records import HOW_TO_REPAIR, new_attempt_id
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import committed_videos
from tests.stages.make import METHODS, do_all, make_config, make_prompts


def made_run(folder: Path) -> tuple[RolloutRun, DecodeStage, DecodeTask]:
    """A run of one rollout with two horizons and no videos, and the task that decodes them."""
    config = make_config(folder, methods={"base": METHODS["base"]}, video={"enabled": False})
    run = RolloutRun(str(folder))
    do_all(run, config, make_prompts("a red fox"))
    stage = DecodeStage(run.storage.address, config.storage, config.backbones, config.video, config.engine)
    settings = decode_settings(pixels_identity(config.backbones["tiny"]), config.video.model_dump())
    return run, stage, DecodeTask(tuple(run.commits()), settings)


def videos(run: RolloutRun) -> list[int]:
    return [video.latent_frames for video in committed_videos(run)]


def test_a_worker_that_must_leave_keeps_what_is_finished_and_the_next_one_makes_the_rest(tmp_path: Path) -> None:
    run, stage, task = made_run(tmp_path)
    assert [len(commit.latent_parts) for commit in task.commits] == [1, 2]
    queued = Task("decode", task)
    assert stage.progress(queued) == 0
    states: list[WorkerState] = []
    answers: Iterator[bool] = iter([False, True])
    leaving = stage.open(LocalHost(states.append, lambda: next(answers)))
    outcome = leaving.work(task, new_attempt_id())
    assert outcome == Yielded("its node is about to be taken away; finished videos are stored")
    assert videos(run) == [6] and stage.progress(queued) > 0
    assert [(state.done, state.total, state.step) for state in states] == [(0, 12, "decoding")]

    outcome = stage.open(LocalHost()).work(task, new_attempt_id())
    # The whole task, whoever did it: the attempt that yielded reported nothing.
    assert isinstance(outcome, Result) and outcome.made == 2
    assert videos(run) == [6, 12]


def test_latents_that_are_not_those_of_the_commit_are_refused_and_what_comes_before_is_made(tmp_path: Path) -> None:
    run, stage, task = made_run(tmp_path)
    part = task.commits[-1].latent_parts[-1]
    (tmp_path / part.path).write_bytes(b"\0" * part.size_bytes)
    outcome = stage.open(LocalHost()).work(task, new_attempt_id())
    assert outcome == Refused(f"{part.path} does not have the recorded checksum. {HOW_TO_REPAIR}")
    assert videos(run) == [6]

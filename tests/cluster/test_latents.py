"""A latent corpus on a real cluster: made, killed, grown, and the same dataset in the end."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from lrag_ray.config.latents import LatentsConfig
from lrag_ray.config.prompts import Prompt, load_prompts
from lrag_ray.dataset import Dataset
from lrag_ray.events import Event, StageBegan, TaskFinished
from lrag_ray.pipelines import latents
from lrag_ray.pipelines.gc import collect_garbage
from lrag_ray.pipelines.latents import make_latents
from lrag_ray.store.dataset_card import read_card
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.decoded import read_decoded
from lrag_ray.store.failures import read_failures
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.stages.make import BACKBONE, METHODS, store_features

ONE_ACTOR = {"actors": 1, "checkpoint_every_blocks": 2}
"""An actor takes seconds to import what it needs."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"prompt number {i}\n" for i in range(12)))
    return path


def make_config(uri: Path, file: Path, **changes: Any) -> LatentsConfig:
    fields: dict[str, Any] = {
        "run": {"uri": str(uri)},
        "prompts": {"path": str(file), "ratio": 0.5},
        "durations_s": [3],
        "backbones": {"tiny": BACKBONE},
        "methods": {"base": METHODS["base"]},
        "engine": ONE_ACTOR,
        "verification_videos": 0,
    }
    config = LatentsConfig.model_validate({**fields, **changes})
    store_features(config, load_prompts(config.prompts))
    return config


def drawn(config: LatentsConfig) -> list[Prompt]:
    return load_prompts(config.prompts)


@pytest.fixture(scope="module")
def quiet(cluster: None, tmp_path_factory: pytest.TempPathFactory, prompts_file: Path) -> RolloutRun:
    """The corpus that nothing disturbed."""
    config = make_config(tmp_path_factory.mktemp("quiet"), prompts_file)
    outcome = make_latents(config)
    assert (outcome.exit_code, outcome.commits_made, outcome.dataset_rollouts, outcome.dataset_frames) == (0, 6, 6, 72)
    assert outcome.dataset_digest == LatentDataset.open(config.run.uri).digest
    return RolloutRun(config.run.uri)


def make_latents_until_killed(fields: dict[str, Any], finished: int) -> None:
    """A driver that kills itself when it hears of rollout number `finished`."""
    heard = 0

    def listen(event: Event) -> None:
        nonlocal heard
        heard += isinstance(event, TaskFinished) and event.stage == "rollouts"
        if heard == finished:
            os.kill(os.getpid(), signal.SIGKILL)

    latents.INDEX_EVERY_S = 0.1
    make_latents(LatentsConfig.model_validate(fields), listener=listen)


def test_a_corpus_whose_driver_is_killed_and_continued_is_the_same_dataset(
    quiet: RolloutRun, tmp_path: Path, prompts_file: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    engine = {"actors": 1, "checkpoint_every_blocks": 1, "address": address}
    fields = make_config(tmp_path, prompts_file, engine=engine).model_dump(mode="json", exclude_unset=True)
    driver = get_context("spawn").Process(target=make_latents_until_killed, args=(fields, 2))
    driver.start()
    driver.join(300)
    assert driver.exitcode == -signal.SIGKILL
    # Its actor may finish the rollout that it is at; nobody gives it another. Readers have a dataset at any moment.
    partial = LatentDataset.open(str(tmp_path))
    assert 1 <= len(partial) <= 3
    outcome = make_latents(make_config(tmp_path, prompts_file))
    assert (outcome.exit_code, outcome.dataset_rollouts) == (0, 6)
    assert outcome.commits_made >= 3
    assert outcome.dataset_digest == LatentDataset.open(quiet.uri).digest
    assert LatentDataset.open(str(tmp_path)).keys == LatentDataset.open(quiet.uri).keys
    assert run_status(RolloutRun(str(tmp_path))).done
    found = collect_garbage(RolloutRun(str(tmp_path)), remove=True, older_than_s=0)
    assert {leftover.kind for leftover in found.leftovers} <= {"merged index", "unnamed part", "probe"}
    assert LatentDataset.open(str(tmp_path)).digest == outcome.dataset_digest
    partial.read(0)


def test_nothing_is_decoded_but_the_verification_videos_and_more_may_be_asked_for(
    quiet: RolloutRun, prompts_file: Path
) -> None:
    config = make_config(Path(quiet.uri), prompts_file)
    assert [commit.video for commit in quiet.commits()] == [None] * 6
    stages: list[str] = []
    outcome = make_latents(config, listener=lambda e: stages.append(e.stage) if isinstance(e, StageBegan) else None)
    assert (outcome.exit_code, outcome.commits_made, stages) == (0, 0, ["dataset"])

    # Grown by a prompt, whose rollout is not among the first two: these are decoded from their latents.
    grown = make_config(
        Path(quiet.uri), prompts_file, prompts={"path": str(prompts_file), "ratio": 0.6}, verification_videos=2
    )
    union = {prompt.prompt_id for prompt in (*drawn(config), *drawn(grown))}
    outcome = make_latents(grown)
    assert (outcome.exit_code, outcome.dataset_rollouts) == (0, len(union))
    first = [prompt.prompt_id for prompt in drawn(grown)[:2]]
    videos = {record.rollout.prompt_id for record in read_decoded(quiet).records.values()}
    videos |= {commit.rollout.prompt_id for commit in quiet.commits() if commit.video is not None}
    assert videos == set(first)
    card = read_card(quiet.storage)
    assert card is not None and card.digest == outcome.dataset_digest
    assert card.seed == 0 and card.prompts["ratio"] == 0.6 and "base" in card.methods
    assert "random_seed" in str(card.backbones["tiny"])


def test_ray_data_reads_the_same_windows(quiet: RolloutRun) -> None:
    data = Dataset.from_run(quiet.uri, window=5)
    whole = Dataset.from_run(quiet.uri)
    rows = data.to_ray().take_all()
    assert len(rows) == len(data)
    found = {(row["rollout"], row["start"]): torch.tensor(row["latents"]) for row in rows}
    for index in range(len(data)):
        rollout, start = data.place(index)
        entry = data.latents.rollouts[rollout]
        assert torch.equal(found[entry.rollout, start], data[index])
    assert {row["key"] for row in rows} == set(data.latents.keys)
    assert sorted(len(row["latents"]) for row in whole.to_ray().take_all()) == sorted(whole.latents.frames.tolist())


def test_a_rollout_that_cannot_be_made_is_named_and_the_dataset_holds_the_rest(
    tmp_path: Path, prompts_file: Path
) -> None:
    config = make_config(
        tmp_path,
        prompts_file,
        prompts={"path": str(prompts_file), "ratio": 0.5, "limit": 3},
        backbones={"tiny": {**BACKBONE, "fail_on_prompt": drawn(make_config(tmp_path, prompts_file))[1].text}},
    )
    outcome = make_latents(config)
    assert (outcome.exit_code, outcome.dataset_rollouts, len(outcome.missing)) == (1, 2, 1)
    failures, _ = read_failures(RolloutRun(str(tmp_path)).storage)
    assert [failure.quarantined for failure in failures] == [False, False, True]

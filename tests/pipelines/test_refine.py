"""Refined prompts of a configuration whose answers are stored: neither Ray nor a model is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.latents import LatentsConfig
from lrag_ray.config.prompts import load_prompts
from lrag_ray.config.schema import PromptsSection, RunConfig
from lrag_ray.errors import ConfigError, UsageError
from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.latents import LatentsOutcome, make_latents
from lrag_ray.pipelines.refine import refine_prompts, write_list
from lrag_ray.stages.refine import RefineStage, RefineTask
from lrag_ray.stages.refinement import encoder_limits, read_template
from lrag_ray.stages.spec import LocalHost, Result
from lrag_ray.store.rollouts import RolloutRun
from tests.chat.servers import ChatProxy
from tests.cluster.drivers import write_config
from tests.stages.make import BACKBONE, make_config

PROMPTS = ("a fox", "a river", "a fox")
LONGER = {"tiny": {**BACKBONE, "transformer": {**BACKBONE["transformer"], "text_len": 96}}}


def good(number: int, body: dict[str, Any]) -> str:
    return f"text:This is {body['messages'][1]['content']} in the light of the morning."


def nothing(number: int, body: dict[str, Any]) -> str:
    return "text:"


def config_in(folder: Path, url: str = "http://127.0.0.1:9/v1", **changes: Any) -> RunConfig:
    """A configuration whose server is gone unless `url` names one."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    refine = {"backend": "openai", "model": "m", "base_url": url, "retries": 1, **changes.pop("refine", {})}
    prompts = {"path": str(folder / "prompts.txt"), "refine": refine}
    return make_config(folder / "run", prompts=prompts, backbones=LONGER, **changes)


def answered(folder: Path, said: Callable[[int, dict[str, Any]], str], **changes: Any) -> RunConfig:
    """The same, with the answers of a server stored in the run."""
    with ChatProxy(None, said) as proxy:
        config = config_in(folder, proxy.url)
        section, storage = config.prompts.refine, RolloutRun(config.run.uri).storage
        assert section is not None
        limits = tuple(encoder_limits(config.backbones.values()))
        worker = RefineStage(storage, section, read_template(section), limits, config.engine).open(LocalHost())
        assert worker.work(RefineTask(("a fox", "a river")), "a") == Result(made=2)
    return config_in(folder, **changes)


def test_stored_answers_are_the_prompts_of_the_run(tmp_path: Path) -> None:
    config = answered(tmp_path, good)
    outcome = refine_prompts(config)
    assert (outcome.exit_code, outcome.missing, outcome.kept_original, outcome.spent.calls) == (0, {}, 0, 2)
    assert [prompt.original for prompt in outcome.prompts] == list(PROMPTS)
    assert outcome.prompts[1].text == "This is a river in the light of the morning."
    stored = build_identity(config, outcome.prompts).prompts[outcome.prompts[1].prompt_id]
    assert (stored.original, stored.refined_by) == ("a river", "m (openai), template extend")
    plain = build_identity(config, load_prompts(config.prompts)).prompts
    assert not any(prompt.original or prompt.refined_by for prompt in plain.values())


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_a_list_is_frozen_once_and_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    config = answered(tmp_path, good)
    refined = refine_prompts(config).prompts
    frozen = tmp_path / f"frozen.{suffix}"
    for _ in range(2):
        found = CliRunner().invoke(
            app, ["refine", str(write_config(tmp_path / "run.yaml", config)), "--to", str(frozen)]
        )
        assert found.exit_code == 0, found.output
    again = load_prompts(PromptsSection(path=str(frozen)))
    assert [prompt.prompt_id for prompt in again] == [prompt.prompt_id for prompt in refined]
    frozen.write_text(frozen.read_text().replace("morning", "evening"))
    with pytest.raises(UsageError, match="perhaps a reviewed list"):
        write_list(refined, str(frozen))
    assert "evening" in frozen.read_text()


def test_without_a_usable_answer_nothing_is_generated(tmp_path: Path) -> None:
    config = answered(tmp_path, nothing)
    outcome = evaluate(config)
    assert (outcome.exit_code, outcome.commits_made) == (1, 0)
    assert sorted(outcome.missing) == ["prompt on line 1", "prompt on line 2", "prompt on line 3"]
    assert "the answer is empty; then: the answer is empty" in outcome.missing["prompt on line 1"]
    corpus = config.model_dump(exclude={"job", "prompts", "scoring"}, exclude_unset=True)
    prompts = {**config.prompts.model_dump(), "ratio": 1.0}
    latents = make_latents(LatentsConfig.model_validate({**corpus, "prompts": prompts}))
    assert isinstance(latents, LatentsOutcome)
    assert (latents.exit_code, latents.dataset_digest, len(latents.missing)) == (1, None, 3)
    assert not (tmp_path / "run" / "run.json").exists()


def test_prompts_stay_as_they_were_where_that_is_asked_for(tmp_path: Path) -> None:
    outcome = refine_prompts(answered(tmp_path, nothing, refine={"on_failure": "original"}))
    assert (outcome.exit_code, outcome.kept_original) == (0, 3)
    assert [prompt.text for prompt in outcome.prompts] == list(PROMPTS)


def test_a_judge_that_cannot_work_is_found_before_prompts_are_paid_for(tmp_path: Path) -> None:
    with ChatProxy(None, good) as proxy:
        with pytest.raises(ConfigError, match=r"scoring\.settings\.chat is not given"):
            evaluate(config_in(tmp_path, proxy.url, scoring={"suite": "judge"}))
        assert proxy.calls == []


def test_the_list_is_printed_as_json_too(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", answered(tmp_path, good))
    found = CliRunner().invoke(app, ["refine", str(path), "--json"])
    assert [each["original"] for each in json.loads(found.stdout)["prompts"]] == list(PROMPTS)

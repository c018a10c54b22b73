"""``job: latents``: its schema, its defaults, and the sample of prompts that the released code draws."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lrag_ray.config.latents import LatentsConfig, SampledPromptsSection
from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import load_prompts, plan_prompts, sample_notes
from lrag_ray.errors import ConfigError, PromptError
from lrag_ray.pipelines.plan import make_plan

CONFIG = """
job: latents
run: {uri: runs/corpus}
prompts: {path: prompts.txt, count: 50}
"""


def released_sample(size: int, ratio: float, seed: int) -> list[int]:
    """As the released generate_latent.py draws: Python's global generator, reseeded."""
    random.seed(seed)
    return sorted(random.sample(range(size), max(1, int(size * ratio))))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "latents.yaml"
    path.write_text(CONFIG)
    return path


def test_the_defaults_are_the_corpus_of_the_paper(config_file: Path) -> None:
    config = load_config(config_file)
    assert isinstance(config, LatentsConfig)
    assert config.backbones["longlive"].label == "LongLive"
    assert config.methods["base"].settings == {"window": 12, "sink": 3}
    assert (config.prompts.ratio, config.prompts.seed) == (0.1, 0)
    plan = make_plan(config, plan_prompts(config.prompts))
    assert (plan.prompts, plan.totals.latent_frames) == (5, 5 * 90)
    # Two of the five are decoded.
    assert plan.totals.video_frames == 2 * 357
    assert plan.totals.decode_flops * 5 == 2 * plan.methods[0].block_decode_flops * 30 * 5


def test_named_methods_and_backbones_take_the_place_of_the_defaults(config_file: Path) -> None:
    config = load_config(config_file, ["methods={infinity_rope: {}}", "backbones={t: {preset: tiny}}"])
    assert (list(config.methods), list(config.backbones)) == (["infinity_rope"], ["t"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts.ratio=0", r"prompts\.ratio"),
        ("prompts.ratio=1.5", r"prompts\.ratio"),
        ("verification_videos=-1", "verification_videos"),
        ("scoring.suite=preview", "a corpus is not scored"),
        ("verification_video=1", "verification_videos"),
        ("job=latent", "latents"),
    ],
)
def test_wrong_values_are_refused(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config_file, [override])


def test_an_evaluation_draws_no_sample(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.ratio"):
        load_config(
            config_file, ["job=evaluate", "durations_s=[3]", "prompts.ratio=0.5", "backbones={t: {preset: tiny}}"]
        )


@pytest.mark.parametrize(
    ("size", "ratio", "seed"), [(1, 0.1, 0), (19, 0.1, 0), (50, 0.3, 7), (400, 0.1, 0), (30, 1.0, 2)]
)
def test_the_sample_is_that_of_the_released_code(tmp_path: Path, size: int, ratio: float, seed: int) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(size)))
    section = SampledPromptsSection(path=str(tmp_path / "prompts.txt"), ratio=ratio, seed=seed)
    state = random.getstate()
    assert [prompt.index for prompt in load_prompts(section)] == released_sample(size, ratio, seed)
    random.setstate(state)
    assert load_prompts(section.model_copy(update={"limit": 3})) == load_prompts(section)[:3]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_blank_lines_count_in_the_sample_as_in_the_released_code(tmp_path: Path, end: str) -> None:
    lines = [f"prompt {i}" if i % 3 else "" for i in range(40)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines) + end)
    with path.open(encoding="utf-8") as file:
        all_lines = [line.rstrip() for line in file]
    expected = [i for i in released_sample(len(all_lines), 0.5, 0) if all_lines[i]]
    section = SampledPromptsSection(path=str(path), ratio=0.5, seed=0)
    assert [prompt.index for prompt in load_prompts(section)] == expected
    (note,) = sample_notes(section)
    assert f"{int(len(all_lines) * 0.5)} of {len(all_lines)}" in note and "blank lines" in note


def test_a_sample_of_blank_lines_alone_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    lines = [""] * 10
    lines[(released_sample(10, 0.1, 0)[0] + 1) % 10] = "the only prompt"
    path.write_text("\n".join(lines))
    with pytest.raises(PromptError, match="every line of the sample is blank"):
        load_prompts(SampledPromptsSection(path=str(path)))


def test_tables_are_sampled_by_record(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(f'{{"prompt": "prompt {i}"}}' for i in range(20)))
    section = SampledPromptsSection(path=str(path), ratio=0.25, seed=3)
    assert [prompt.text for prompt in load_prompts(section)] == [f"prompt {i}" for i in released_sample(20, 0.25, 3)]

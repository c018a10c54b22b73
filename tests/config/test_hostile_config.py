"""Configurations that nobody means: a message with the place, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrag_ray.config.load import complete, load_config
from lrag_ray.config.source import parse_document
from lrag_ray.errors import ConfigError

LINES = {
    "run": "run: {uri: runs/x, seed: 0}",
    "prompts": "prompts: {count: 4, samples: 1}",
    "durations_s": "durations_s: [1.5]",
    "backbones": "backbones: {tiny: {preset: tiny}}",
    "methods": "methods: {base: {}}",
}


def text_with(line: str) -> str:
    """A valid configuration with one line added, or put in place of its own."""
    key = line.partition(":")[0]
    return "\n".join({**LINES, key: line}.values())


def test_a_long_text_that_is_named_again_and_again_is_refused_before_it_is_written() -> None:
    bomb = f'x: &x "{"a" * 20_000}"\ny: [{", ".join(["*x"] * 1000)}]'
    with pytest.raises(ConfigError, match=r"run\.yaml:1: more than 16,777,216 characters, aliases expanded"):
        parse_document("run.yaml", bomb)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("label: !!python/object/apply:os.system [ls]", "the YAML tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("label: !mine 3", "the YAML tag !mine is not supported"),
        ("label: !!binary aGk=", "the YAML tag tag:yaml.org,2002:binary is not supported"),
        ("label: !!set {a}", "the YAML tag tag:yaml.org,2002:set is not supported"),
        ("run: {uri: x, seed: !!int abc}", "'abc' is not of the type int"),
        ("run: {uri: x, seed: !!int ''}", "'' is not of the type int"),
        (f"run: {{uri: x, seed: {'9' * 5000}}}", "a whole number of 5000 digits"),
        ("run: {uri: x, seed: 18446744073709551616}", "run.seed: must be below 9223372036854775808"),
        ('run: {uri: "a\\0b"}', "text with a NUL character"),
        ("run: {uri: a\0b}", "the character U+0000 is not allowed"),
        (f"x: {'[' * 5000}", "nested too deeply"),
        ('methods: {a: {method: ".foo:X"}}', "method '.foo:X' is not of the form package.module:Policy"),
        ('methods: {a: {method: ":X"}}', "method ':X' is not of the form package.module:Policy"),
        ('methods: {a: {method: "a b:X"}}', "method 'a b:X' is not of the form package.module:Policy"),
        ('scoring: {suite: ".foo:X"}', "suite '.foo:X' is not of the form package.module:Suite"),
        ("backbones: {tiny: {preset: tiny, transformer: {num_heads: 0}}}", "num_heads 0 must be at least 1"),
        ("backbones: {tiny: {preset: tiny, transformer: {patch_size: [1, 0, 0]}}}", "patch_size 0 must be at least 1"),
        ("backbones: {tiny: {preset: tiny, sampler: {shift: 0}}}", "shift 0.0 must be above 0"),
        ('storage: {endpoint_url: "http://[::1"}', "without credentials, such as http://localhost:9000"),
    ],
)
def test_a_value_that_cannot_be_read_is_named_with_its_place(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml") as refused:
        complete(parse_document("run.yaml", text_with(line)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("video: {fps: 2147483648}", "video.fps: must be at most 1000, got 2147483648"),
        ("engine: {threads_per_actor: 100000000000}", "engine.threads_per_actor: must be at most 4096"),
        ("engine: {cpus_per_actor: 1e9}", "engine.cpus_per_actor: must be at most 4096"),
        ("engine: {gpus_per_actor: 1e9}", "engine.gpus_per_actor: must be at most 64"),
        ("engine: {actors: 1000000000}", "engine.actors: must be at most 100000"),
        ("engine: {actors: {min: 1, max: 1000000000}}", "engine.actors: max must be at most 100000"),
        ("engine: {max_attempts: 1000000000}", "engine.max_attempts: must be at most 1000"),
        ("engine: {checkpoint_every_blocks: 1000000000}", "engine.checkpoint_every_blocks: must be at most 100000"),
        ("engine: {stall_timeout_s: 1e300}", "engine.stall_timeout_s: must be at most 604800"),
        ("storage: {attempts: 1000000000}", "storage.attempts: must be at most 1000"),
        ("storage: {retry_for_s: 1e300}", "storage.retry_for_s: must be at most 604800"),
        ("scoring: {workers: 1000000000}", "scoring.workers: must be at most 100000"),
        ("prompts: {count: 4, samples: 1000000000}", "prompts.samples: must be at most 10000"),
        ("prompts: {count: 4, limit: 1000000000}", "prompts.limit: must be at most 1000000"),
        ("prompts: {count: 1000000000}", "prompts.count: must be at most 1000000"),
        ("prompts: {count: 1000000, samples: 10000}", "prompts.samples: comes to 10,000,000,000 rollouts"),
        ("durations_s: [1e9]", "duration 1000000000.0 s must be above 0 and at most 3600"),
    ],
)
def test_a_value_that_can_only_be_a_slip_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        complete(parse_document("run.yaml", text_with(line)))
    assert message in str(refused.value)


def test_more_tables_than_anybody_reads_are_refused() -> None:
    backbones = {f"b{number}": {"preset": "tiny"} for number in range(51)}
    text = yaml.safe_dump(
        yaml.safe_load("\n".join(LINES.values()))
        | {"backbones": backbones, "durations_s": [float(second) for second in range(1, 101)]}
    )
    with pytest.raises(ConfigError, match="methods: come to 5,100 with backbones and durations_s; a run has at most"):
        complete(parse_document("run.yaml", text))


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(min_value=10**30, max_value=10**34),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(
            [".foo:X", "a:b", "per_gpu", "s3://a:b@c/d", "\x1b[31m", "..", "~", "$HOME", "1e999", "x" * 500]
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "run",
        "run.uri",
        "run.seed",
        "job",
        "preset",
        "storage",
        "storage.region",
        "storage.attempts",
        "storage.endpoint_url",
        "prompts",
        "prompts.path",
        "prompts.limit",
        "prompts.samples",
        "durations_s",
        "backbones",
        "backbones.tiny",
        "backbones.tiny.preset",
        "backbones.tiny.transformer",
        "backbones.tiny.transformer.num_heads",
        "backbones.tiny.transformer.patch_size",
        "backbones.tiny.sampler",
        "backbones.tiny.sampler.denoising_steps",
        "backbones.tiny.weights",
        "backbones.tiny.weights.lora",
        "backbones.tiny.latent",
        "backbones.tiny.vae",
        "backbones.tiny.text_encoder",
        "methods",
        "methods.rag",
        "methods.rag.method",
        "methods.rag.window",
        "methods.rag.top_k",
        "methods.rag.encoder",
        "engine",
        "engine.address",
        "engine.actors",
        "engine.gpus_per_actor",
        "resume",
        "video",
        "video.fps",
        "scoring",
        "scoring.suite",
        "scoring.dimensions",
        "scoring.controls",
        "scoring.settings",
        "x",
    ]
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_any_values_give_a_configuration_or_a_message(changes: dict[str, Any]) -> None:
    data = yaml.safe_load("\n".join(LINES.values()))
    for path, value in changes.items():
        *sections, last = path.split(".")
        target = data
        for section in sections:
            target[section] = target[section] if isinstance(target.get(section), dict) else {}
            target = target[section]
        target[last] = value
    try:
        complete(parse_document("run.yaml", yaml.safe_dump(data, allow_unicode=True)))
    except ConfigError as refused:
        assert str(refused)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 120), st.integers(0, 10))
def test_any_bytes_give_a_configuration_or_a_message(tmp_path: Path, piece: bytes, at: int, gone: int) -> None:
    whole = "\n".join(LINES.values()).encode()
    (tmp_path / "run.yaml").write_bytes(whole[:at] + piece + whole[at + gone :])
    try:
        load_config(tmp_path / "run.yaml")
    except ConfigError as refused:
        assert str(refused)

"""A run configuration from its file and ``--set`` overrides.

Order: the file, then the overrides, then each backbone's preset and the run's own under what was given. What comes out
is complete and checked as far as it can be without reading any other file; all that is wrong is reported at once.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lrag_ray.config.foreign import is_foreign
from lrag_ray.config.histories import history_frames, history_places
from lrag_ray.config.horizons import LATENT_FRAMES_PER_SECOND, latent_frames
from lrag_ray.config.jobs import JOB_DEFAULTS, JobConfig, schema_of
from lrag_ray.config.methods import Method, resolve_method, settings_keys
from lrag_ray.config.overrides import apply_overrides
from lrag_ray.config.paths import beside_configuration
from lrag_ray.config.plugin_settings import settings_model
from lrag_ray.config.presets import AS_RELEASED, PRESETS, overlay
from lrag_ray.config.problems import Problem, key_paths, raise_problems, translate, unknown
from lrag_ray.config.schema import MOST_CELLS, MOST_ROLLOUTS, BackboneConfig, RunConfig, ScoringSection
from lrag_ray.config.source import Document, KeyPath, dotted, read_document
from lrag_ray.config.sweeps import expand_sweeps
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.context.registry import policy_class, registered
from lrag_ray.errors import ConfigError
from lrag_ray.printable import counted
from lrag_ray.scoring.registry import NONE, suite_class
from lrag_ray.scoring.registry import registered as registered_suites
from lrag_ray.wan.kernels import unfit

LONGEST_FRAMES = 10_000
"""Latent frames after which every method that keeps a history has one."""


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read, override, complete and check the configuration of any job.

    Raises:
        ConfigError: names for each problem the file and line (or the override), the key path, and the nearest valid
            name or what was expected.
    """
    document = read_document(path)
    config = _complete(document, overrides)
    raise_problems(document, _misplaced(config, Path(path).parent))
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """`load_job` for what needs generators and prompts; ConfigError for a job that has none."""
    config = load_job(path, overrides)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{path}: job {config.job} has no generators, prompts or videos, which this command needs. Fix: give the "
            "configuration of an evaluation"
        )
    return config


def complete(document: Document, overrides: Sequence[str] = ()) -> RunConfig:
    """What `load_config` does after reading, of a document that describes rollouts; changes it."""
    config = _complete(document, overrides)
    assert isinstance(config, RunConfig), "documents that are made here describe rollouts"
    return config


def _complete(document: Document, overrides: Sequence[str]) -> JobConfig:
    if is_foreign(document.data):
        raise ConfigError(
            f"{document.name}: an inference configuration of Self-Forcing, Causal-Forcing, LongLive or LongLive-RAG. "
            f"Fix: lrag-ray import-config {shlex.quote(document.name)} --to mine.yaml, and give mine.yaml"
        )
    refused = [*apply_overrides(document, overrides)]
    for key, value in JOB_DEFAULTS.get(str(document.data.get("job")), {}).items():
        document.data.setdefault(key, copy.deepcopy(value))
    problems = [*_name_methods(document), *expand_sweeps(document), *_merge_presets(document)]
    # A training has a preset of the same name, with other meaning.
    if document.data.get("preset") == "as_released" and document.data.get("job") != "train_encoder":
        _merge_released(document.data)
    config, found = _validated(document)
    problems += found
    if isinstance(config, TrainEncoderConfig):
        raise_problems(document, problems, refused)
        return config
    for name, section in _sections(document.data, "methods"):
        problems += _check_settings(("methods", name), section)
    problems += check_suite(document.data)
    if config is not None and not problems:
        problems += _check_fit(config)
    raise_problems(document, problems, refused)
    assert config is not None, "a configuration that is not valid has problems"
    return config


def config_keys(schema: type[JobConfig] = RunConfig) -> list[str]:
    """Every key path that a configuration may have; ``*`` stands for a name of the user's."""
    settings = {key for name in registered() for key in settings_keys(policy_class(name))}
    return key_paths(schema, lambda section: sorted(settings) if section == "methods.*" else ())


def _sections(data: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named subsections of `key`; what is not a section is left to the validation."""
    group = data.get(key)
    if isinstance(group, dict):
        yield from ((name, section) for name, section in group.items() if isinstance(section, dict))


def _name_methods(document: Document) -> Iterator[Problem]:
    """Fill in `method` where the setting is called like a registered method."""
    group = document.data.get("methods")
    if not isinstance(group, dict):
        return
    for name in group:
        if group[name] is None and name in registered():
            group[name] = {}
    for name, section in _sections(document.data, "methods"):
        if "method" in section:
            continue
        if name in registered():
            section["method"] = name
        else:
            known = ", ".join(registered())
            section["method"] = ""
            yield Problem(("methods", name, "method"), f"is missing; '{name}' is none of the methods {known}")


def _merge_presets(document: Document) -> Iterator[Problem]:
    for name, section in _sections(document.data, "backbones"):
        preset = section.get("preset")
        if not isinstance(preset, str):
            continue
        if preset not in PRESETS:
            yield Problem(("backbones", name, "preset"), unknown(f"preset '{preset}'", preset, PRESETS))
            # So that the values that this preset would have brought are not missed one by one.
            document.data["backbones"][name] = overlay(PRESETS["tiny"], section)
        else:
            document.data["backbones"][name] = _labelled(preset, section)
    for name, section in _sections(document.data, "methods"):
        if section.get("preset") != "released":
            continue
        with suppress(ValueError):
            if not (released := policy_class(str(section["method"])).released):
                yield Problem(
                    ("methods", name, "preset"), f"method '{section['method']}' has no released settings here"
                )
            _put_under(section, released)


def _labelled(preset: str, section: dict[str, Any]) -> dict[str, Any]:
    """The section over its preset; the preset's label is that of its weights, so files of other names get their own."""
    merged = overlay(copy.deepcopy(PRESETS[preset]), section)
    if "label" in section:
        return merged
    (path, lora), (published, published_lora) = _weight_names(merged), _weight_names(PRESETS[preset])
    label = PRESETS[preset]["label"]
    if path != published:
        label = f"{f'own weights {path}' if path else 'random weights'}, sizes of {label}"
    if lora != published_lora:
        label += f", own LoRA {lora}" if lora else ", without LoRA"
    merged["label"] = label
    return merged


def _weight_names(section: Mapping[str, Any]) -> list[str]:
    """Names of the generator's weights and of its LoRA; empty where there is none."""
    weights = section.get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    lora = weights.get("lora")
    paths = [weights.get("path") or weights.get("builtin"), lora.get("path") if isinstance(lora, Mapping) else None]
    return [str(path or "").rstrip("/").rpartition("/")[2] for path in paths]


def _merge_released(data: dict[str, Any]) -> None:
    """Put the values of as_released under those that are given; what is not a section is left to the validation."""
    if isinstance(data.setdefault("video", {}), dict):
        data["video"] = AS_RELEASED["video"] | data["video"]
    for _, backbone in _sections(data, "backbones"):
        if isinstance(backbone.setdefault("vae", {}), dict):
            backbone["vae"] = AS_RELEASED["vae"] | backbone["vae"]
    for _, section in _sections(data, "methods"):
        # A method that there is not is reported where the settings are checked.
        with suppress(ValueError):
            _put_under(section, policy_class(str(section["method"])).as_released)


def _put_under(section: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    for key, value in defaults.items():
        section.setdefault(key, value)


def _validated(document: Document) -> tuple[JobConfig | None, list[Problem]]:
    # Strict JSON takes no quoted number for a number and no true for 1, but lists and sections for tuples, dataclasses.
    try:
        schema = schema_of(document.data)
    except ValueError as error:
        return None, [Problem(("job",), str(error))]
    try:
        return schema.model_validate_json(json.dumps(document.data), strict=True), []
    except ValidationError as error:
        return None, [*translate(error, schema, elsewhere=config_keys(schema))]


def _check_settings(path: KeyPath, section: dict[str, Any]) -> Iterator[Problem]:
    """Check a method's keys against the policy's own settings."""
    name = section.get("method")
    if not isinstance(name, str) or not name:
        return
    try:
        policy = policy_class(name)
    except ValueError as error:
        yield Problem((*path, "method"), str(error))
        return
    given = {key: value for key, value in section.items() if key not in ("method", "preset", "history")}
    try:
        settings_model(policy.Settings).model_validate_json(json.dumps({"settings": given}), strict=True)
    except ValidationError as error:
        yield from translate(error, policy.Settings, path, skip=1)


def check_suite(data: dict[str, Any]) -> Iterator[Problem]:
    """Check the settings of a scoring suite against the suite's own."""
    section = data.get("scoring")
    if not isinstance(section, dict):
        return
    name, given = section.get("suite", ""), section.get("settings", {})
    if not isinstance(name, str) or not isinstance(given, dict) or not (":" in name or given):
        return
    if name == NONE or (":" not in name and name not in registered_suites()):
        return
    try:
        suite = suite_class(name or ScoringSection().suite)
    except ValueError as error:
        yield Problem(("scoring", "suite"), str(error))
        return
    try:
        settings_model(suite.Settings).model_validate_json(json.dumps({"settings": given}), strict=True)
    except ValidationError as error:
        yield from translate(error, suite.Settings, ("scoring", "settings"), skip=1)


def _check_fit(config: RunConfig) -> Iterator[Problem]:
    """Methods against backbones and durations, and the size of the whole."""
    prompts = config.prompts.limit or config.prompts.count or 1
    rollouts = prompts * config.prompts.samples * len(config.backbones) * len(config.methods)
    if rollouts > MOST_ROLLOUTS:
        yield Problem(
            ("prompts", "samples"), f"comes to {counted(rollouts, 'rollout')}; a run has at most {MOST_ROLLOUTS:,}"
        )
    cells = len(config.backbones) * len(config.methods) * len(config.durations_s)
    if cells > MOST_CELLS:
        yield Problem(
            ("methods",), f"come to {cells:,} with backbones and durations_s; a run has at most {MOST_CELLS:,}"
        )
    yield from _check_attention(config)
    yield from _check_products(config)
    for name, section in config.methods.items():
        method = resolve_method(section)
        path: KeyPath = ("methods", name)
        for file in method.policy.weight_files(method.settings):
            if file.used and file.address(method.settings) is None:
                yield Problem((*path, file.key), f"is missing: {file.hint}")
        for backbone in config.backbones.values():
            frames_per_block = backbone.sampler.frames_per_block
            try:
                method.policy.check_sampler(method.settings, backbone.sampler)
                sizes, latent = backbone.transformer, backbone.latent
                tokens = sizes.tokens_per_frame(latent.height, latent.width)
                method.policy.check_model(method.settings, sizes.num_layers, sizes.num_heads, tokens)
                method.policy.check_run(method.settings, frames_per_block)
            except ValueError as error:
                yield Problem(path, str(error))
            yield from _check_length(path, method, config.durations_s, frames_per_block)
            yield from _check_history(path, method, config, backbone)


def _check_attention(config: RunConfig) -> Iterator[Problem]:
    """A kernel that no device could compute a backbone with."""
    engine = config.engine
    for name, backbone in config.backbones.items():
        if engine.attention == "auto":
            return
        on_gpu, head_dim = engine.gpus_per_actor > 0, backbone.transformer.head_dim
        reason = unfit(engine.attention, on_gpu=on_gpu, dtype=backbone.dtype, head_dim=head_dim)
        if reason is not None:
            yield Problem(
                ("engine", "attention"),
                f"is {engine.attention}, which {reason}, for {dotted(('backbones', name))} with "
                f"engine.gpus_per_actor {engine.gpus_per_actor:g}: use auto",
            )


def _check_products(config: RunConfig) -> Iterator[Problem]:
    """Products that no device computes for a backbone."""
    for name, backbone in config.backbones.items():
        sizes, path = backbone.transformer, ("backbones", name, "products")
        if backbone.products == "exact":
            continue
        if sizes.dim % 16 or sizes.ffn_dim % 16:
            yield Problem(
                path,
                f"is {backbone.products}, which needs a dim and an ffn_dim that are multiples of 16, not {sizes.dim} "
                f"and {sizes.ffn_dim}: use exact",
            )
        if config.engine.gpus_per_actor > 0 and backbone.dtype != "bfloat16":
            yield Problem(
                path,
                f"is {backbone.products}, which a GPU computes for bfloat16 alone, not for {backbone.dtype}: use exact",
            )


def _check_history(path: KeyPath, method: Method, config: RunConfig, backbone: BackboneConfig) -> Iterator[Problem]:
    """Storage types for methods without a history, and histories beyond the budgets of `engine.bank`."""
    n = backbone.sampler.frames_per_block
    if method.history != "exact" and not history_frames(backbone, method, LONGEST_FRAMES):
        yield Problem(
            (*path, "history"),
            f"is {method.history}, but this method keeps no history with these settings: leave it out",
        )
    longest = max(latent_frames(duration_s, n) for duration_s in config.durations_s)
    bank, on_gpu = config.engine.bank, config.engine.gpus_per_actor > 0
    found = history_places(backbone, method, longest, bank, on_gpu=on_gpu)
    if found.homeless:
        smaller = "" if method.history.startswith("int4") else f", or set {dotted((*path, 'history'))}: int4"
        yield Problem(
            ("engine", "bank", "host_gb"),
            f"{bank.host_gb:g} leave {found.homeless / 1e9:.1f} GB of the {found.total / 1e9:.1f} GB of history of "
            f"{dotted(path)} without a place: raise host_gb, name a folder in engine.bank.disk{smaller}",
        )


def _misplaced(config: JobConfig, folder: Path) -> Iterator[Problem]:
    """Relative paths that mean the folder of the configuration, where the program runs in another one."""
    for key, address, there in beside_configuration(config, folder):
        override = shlex.quote(f"{dotted(key)}={there / address}")
        where = "beside the configuration" if there == folder else f"in {there}"
        yield Problem(
            key,
            f"'{address}' is not in the working directory but {where}, and relative paths mean the working directory. "
            f"Fix: run lrag-ray in {shlex.quote(str(there))}, or --set {override}",
        )


def _check_length(
    path: KeyPath, method: Method, durations_s: Sequence[float], frames_per_block: int
) -> Iterator[Problem]:
    limit = method.policy.max_frames
    for duration_s in durations_s:
        frames = latent_frames(duration_s, frames_per_block)
        if limit is not None and frames > limit:
            yield Problem(
                path,
                f"{duration_s:g} s are {frames} latent frames, but this method counts frames from the first one and "
                f"the generator's table of temporal rotations ends at {limit}: at most "
                f"{limit // frames_per_block * frames_per_block / LATENT_FRAMES_PER_SECOND:g} s",
            )

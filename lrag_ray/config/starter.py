"""A first configuration, with comments, for what a person wants to compare and the machines they have."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence

from lrag_ray.config.overrides import quoted
from lrag_ray.config.presets import PRESETS
from lrag_ray.config.problems import unknown
from lrag_ray.context.registry import policy_class, registered
from lrag_ray.errors import UsageError

_ENCODER = "weights/ae_latent_mem.pt"
"""Where `weights pull` puts the released retrieval encoder."""


def read_presets(text: str) -> list[str]:
    """Names of presets with commas between. Raises UsageError for one that does not exist."""
    return _existing("preset", text, PRESETS)


def read_methods(text: str) -> list[str]:
    """Names of context methods with commas between. Raises UsageError for one that does not exist."""
    return _existing("method", text, registered())


def _existing(kind: str, text: str, known: Collection[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(unknown(f"{kind} '{name}'", name, known))
    return names


def starter(
    *,
    uri: str,
    prompts: str,
    backbones: Sequence[str],
    methods: Sequence[str],
    durations_s: Sequence[float],
    gpus: int,
) -> str:
    """YAML text of a complete configuration; `gpus` are those of the machine or cluster, 0 runs on CPUs.

    `backbones` and `methods` are names that exist (`read_presets`, `read_methods`).
    """
    seconds = ", ".join(f"{each:g}" for each in durations_s)
    real = any("path" in PRESETS[name]["weights"] for name in backbones)
    lines = [
        "# `lrag-ray plan` says what this comes to, `lrag-ray doctor` what is missing, `lrag-ray run` does it.",
        "# The same command again continues; prompts, methods, backbones and durations may be added in between.",
        "job: evaluate",
        "",
        "run:",
        f"  uri: {quoted(uri)} # a folder that every node sees, or s3://bucket/path",
        "  seed: 0",
        "",
        "prompts:",
        f"  path: {quoted(prompts)} # one prompt a line, or a table with a column `prompt`",
        "",
        f"durations_s: [{seconds}] # shorter ones are prefixes of one rollout to the longest",
        "",
        "backbones: # `lrag-ray presets` lists them, `lrag-ray weights pull` fetches their files",
        *(f"  {name}: {{preset: {name}}}" for name in backbones),
        "",
        "methods: # `lrag-ray methods` lists them with their settings; a list is a sweep, such as top_k: [2, 4, 6]",
        *(f"  {name}: {_settings(name, real)}" for name in methods),
        "",
        "engine:",
        *_engine(gpus),
        "",
        "scoring:",
        *_scoring(gpus, real),
        "",
    ]
    return "\n".join(lines)


def _settings(name: str, real: bool) -> str:
    settings = inspect.signature(policy_class(name).Settings).parameters
    if "encoder" not in settings:
        return "{}"
    return f"{{encoder: {_ENCODER}}}" if real else "{descriptor: avg_pool} # without a trained retrieval encoder"


def _engine(gpus: int) -> list[str]:
    if not gpus:
        return ["  actors: 1 # rollouts at a time, on CPUs", "  gpus_per_actor: 0"]
    actors = "per_gpu # follows GPUs that join and leave" if gpus > 1 else "1"
    return [f"  actors: {actors}", "  gpus_per_actor: 1"]


def _scoring(gpus: int, real: bool) -> list[str]:
    if not real:
        return ["  suite: preview # needs no networks; its numbers are not VBench's"]
    return [
        "  suite: vbench_long",
        "  mode: compat # clips re-encoded as the official code does: stands beside published numbers",
        "  weights: weights/vbench",
        f"  gpus_per_worker: {int(gpus > 0)}",
    ]

"""A run small enough for tests: a generator of two thin layers, 32 x 48 pixels, horizons of 6 and 12 latent frames."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lrag_ray.config.prompts import Prompt, make_prompt
from lrag_ray.config.schema import RunConfig
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.stages.rollout.pending import pending_rollouts
from lrag_ray.stages.rollout.worker import RolloutStage, RolloutTask
from lrag_ray.stages.spec import LocalHost
from lrag_ray.stages.text import TextStage, TextTask
from lrag_ray.store.embeddings import embedding_path
from lrag_ray.store.identity import RunIdentity, canonical_digest
from lrag_ray.store.records import Commit, new_attempt_id
from lrag_ray.store.rollouts import RolloutRun

BACKBONE: dict[str, Any] = {
    "label": "tiny, untrained",
    "transformer": {
        "dim": 24,
        "ffn_dim": 32,
        "freq_dim": 16,
        "text_dim": 8,
        "text_len": 8,
        "num_heads": 2,
        "num_layers": 2,
    },
    "sampler": {"denoising_steps": [1000, 500]},
    "weights": {"random_seed": 3},
    "latent": {"channels": 16, "height": 4, "width": 6},
    "dtype": "float32",
    "text_encoder": {"kind": "tiny"},
    "vae": {"kind": "tiny"},
}
METHODS: dict[str, Any] = {
    "base": {"method": "base", "window": 9},
    "rag": {"method": "rag", "window": 9, "top_k": 2, "recent_exclude": 0, "descriptor": "avg_pool"},
}


def make_config(uri: Path | str, **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "run": {"uri": str(uri)},
        "prompts": {"path": "given as objects"},
        "durations_s": [1.5, 3],
        "backbones": {"tiny": BACKBONE},
        "methods": METHODS,
        "engine": {"actors": 2, "checkpoint_every_blocks": 2},
        "scoring": {"suite": "none"},
    }
    return RunConfig.model_validate({**fields, **changes})


def make_prompts(*texts: str) -> list[Prompt]:
    return [make_prompt(index, text) for index, text in enumerate(texts)]


def digests(commits: Sequence[Commit]) -> dict[tuple[str, str, int], str]:
    """Digest of the latents by (method, text hash, horizon): comparable over runs with other line numbers."""
    return {
        (commit.rollout.method, commit.rollout.prompt_id.split("-")[1], commit.latent_frames): commit.latents_digest
        for commit in commits
    }


def part_bytes(run: RolloutRun, commits: Sequence[Commit]) -> dict[tuple[str, str, int], list[tuple[str, str]]]:
    """Checksums of latent and trace parts by (method, text hash, horizon)."""
    return {
        (commit.rollout.method, commit.rollout.prompt_id.split("-")[1], commit.latent_frames): [
            (latents.sha256, trace.sha256)
            for latents, trace in zip(commit.latent_parts, commit.trace_parts, strict=True)
        ]
        for commit in commits
    }


def store_features(config: RunConfig, prompts: Sequence[Prompt]) -> RunConfig:
    """Store the text features of `prompts`, so that a start needs no worker that imports a text encoder.

    For tests that are not about text.
    """
    identity, storage = build_identity(config, prompts), RolloutRun(config.run.uri).storage
    for backbone in identity.backbones.values():
        digest = canonical_digest(backbone.latents["text_encoder"])
        for prompt in prompts:
            storage.create(embedding_path(digest, prompt.text), _features(digest, prompt.text))
    return config


@cache
def _features(digest: str, prompt: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        config, storage = make_config(folder), RolloutRun(folder).storage
        worker = TextStage(storage, config.backbones, config.engine).open(LocalHost())
        worker.work(TextTask("tiny", digest, prompt), new_attempt_id())
        return storage.read_bytes(embedding_path(digest, prompt))


def encode_texts(run: RolloutRun, config: RunConfig, tasks: Sequence[RolloutTask]) -> None:
    """Store the text features of the tasks' prompts."""
    worker = TextStage(run.storage, config.backbones, config.engine).open(LocalHost())
    for task in tasks:
        worker.work(TextTask(task.rollout.backbone, task.text_digest, task.prompt), new_attempt_id())


def pending_tasks(run: RolloutRun, identity: RunIdentity) -> list[RolloutTask]:
    """Rollouts that are not done."""
    return [task.payload for task in pending_rollouts(identity, run.inventory(), lambda *_: 0).tasks]


def do_all(run: RolloutRun, config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Do every rollout of `config` in this process, one after the other."""
    tasks = pending_tasks(run, run.ensure(build_identity(config, prompts)))
    encode_texts(run, config, tasks)
    worker = RolloutStage.of(run, config).open(LocalHost())
    for task in tasks:
        worker.work(task, new_attempt_id())

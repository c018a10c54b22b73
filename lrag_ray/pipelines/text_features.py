"""Text features of a run: every distinct prompt is encoded once per text encoder, before the rollouts need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrag_ray.config.schema import BackboneConfig
from lrag_ray.engine.sizing import PoolSize
from lrag_ray.pipelines.job import Job
from lrag_ray.stages.rollout.worker import RolloutTask
from lrag_ray.stages.spec import Task
from lrag_ray.stages.text import TextStage, TextTask
from lrag_ray.store.embeddings import embedding_path, without_features
from lrag_ray.store.identity import RunIdentity


class TextFeatures:
    """Encodes the prompts of one start; needs Ray."""

    def __init__(self, job: Job[Any], backbones: Mapping[str, BackboneConfig], identity: RunIdentity) -> None:
        self._job = job
        self._backbones = backbones
        self._prompts = identity.prompts

    def encode_prompts(self, tasks: Sequence[Task[RolloutTask]]) -> list[Task[RolloutTask]]:
        """Store the text features of every distinct open prompt, once per text encoder.

        Returns the rollouts whose prompt could be encoded; the others are missing.
        """
        wanted = {(task.payload.text_digest, task.payload.prompt): task for task in reversed(tasks)}
        by_encoder: dict[str, list[str]] = {}
        for digest, prompt in reversed(wanted):
            by_encoder.setdefault(digest, []).append(prompt)
        lost = self.encode(
            {
                (digest, prompt): wanted[digest, prompt].group
                for digest, prompts in by_encoder.items()
                for prompt in without_features(self._job.storage, digest, prompts)
            }
        )
        for task in tasks:
            if (task.payload.text_digest, task.payload.prompt) in lost:
                self._job.missing[task.title] = "its prompt could not be encoded"
        return [task for task in tasks if task.title not in self._job.missing]

    def encode(self, texts: Mapping[tuple[str, str], str]) -> set[tuple[str, str]]:
        """Encode (text encoder, prompt) with the encoder of a backbone; returns those that could not be."""
        if not texts:
            return set()
        ids = {prompt.text: prompt_id for prompt_id, prompt in self._prompts.items()}
        tasks = [
            Task(
                key=embedding_path(digest, prompt),
                payload=TextTask(backbone, digest, prompt),
                order=order,
                group=digest,
                name=f"prompt {ids[prompt]} of {backbone}",
            )
            for order, ((digest, prompt), backbone) in enumerate(texts.items())
        ]
        # One worker: it reads the encoder (11 GB for umT5-xxl) once.
        stage = TextStage(self._job.storage, self._backbones, self._job.engine)
        failed = self._job.run_stage(stage, tasks, size=PoolSize(1, 1))
        return {(task.payload.text_digest, task.payload.prompt) for task in failed}

"""Jobs by name. A new job is one module, a schema in `lrag_ray.config.jobs` and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.prompts import Prompt
from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import UsageError
from lrag_ray.events import Listener, silent
from lrag_ray.pipelines.evaluate import RunOutcome, evaluate
from lrag_ray.pipelines.latents import make_latents
from lrag_ray.pipelines.train_encoder import TrainingOutcome, train_encoder

JOBS: dict[str, Callable[..., Any]] = {"evaluate": evaluate, "latents": make_latents, "train_encoder": train_encoder}
"""What starts a job, by the `job` of its configuration."""

JobOutcome = RunOutcome | TrainingOutcome


def start(config: JobConfig, prompts: Sequence[Prompt] | None = None, listener: Listener = silent) -> JobOutcome:
    """Start the job that `config` describes. UsageError for prompts of a job that has none."""
    if prompts is not None and not isinstance(config, RunConfig):
        raise UsageError(f"job {config.job} takes no prompts")
    given = [] if prompts is None else [prompts]
    outcome: JobOutcome = JOBS[config.job](config, *given, listener=listener)
    return outcome

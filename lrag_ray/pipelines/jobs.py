"""Jobs by name. A new job is one module, a schema in `lrag_ray.config.jobs` and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lrag_ray.config.prompts import Prompt
from lrag_ray.config.schema import RunConfig
from lrag_ray.events import Listener, silent
from lrag_ray.pipelines.evaluate import RunOutcome, evaluate
from lrag_ray.pipelines.latents import make_latents

JOBS: dict[str, Callable[..., RunOutcome]] = {"evaluate": evaluate, "latents": make_latents}
"""What starts a job, by the `job` of its configuration."""


def start(config: RunConfig, prompts: Sequence[Prompt] | None = None, listener: Listener = silent) -> RunOutcome:
    """Start the job that `config` describes."""
    return JOBS[config.job](config, prompts, listener=listener)

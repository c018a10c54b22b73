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
from lrag_ray.pipelines.watching import watching

JOBS: dict[str, Callable[..., Any]] = {"evaluate": evaluate, "latents": make_latents, "train_encoder": train_encoder}
"""What starts a job, by the `job` of its configuration."""

JobOutcome = RunOutcome | TrainingOutcome


def start(
    config: JobConfig, prompts: Sequence[Prompt] | None = None, listener: Listener = silent, *, repair: bool = False
) -> JobOutcome:
    """Start the job that `config` describes, and let those of `config.watch` see it.

    With `repair` it first makes again what is damaged in its run. UsageError for prompts or a repair of a job that has
    none.
    """
    given: list[Any] = [] if prompts is None else [prompts]
    options = {"repair": True} if repair else {}
    if not isinstance(config, RunConfig) and (given or options):
        raise UsageError(f"job {config.job} takes no {'prompts' if given else 'repair (--repair)'}")
    with watching(config, listener) as watched:
        outcome: JobOutcome = JOBS[config.job](config, *given, listener=watched.report, **options)
        watched.exit_code, watched.missing = outcome.exit_code, dict(outcome.missing)
    return outcome

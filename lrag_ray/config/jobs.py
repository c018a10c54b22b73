"""Configuration schemas by job. `job` in the file says which one applies; `evaluate` where it is absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrag_ray.config.latents import DEFAULTS as LATENTS_DEFAULTS
from lrag_ray.config.latents import LatentsConfig
from lrag_ray.config.problems import unknown
from lrag_ray.config.schema import RunConfig
from lrag_ray.config.training import TrainEncoderConfig

JobConfig = RunConfig | TrainEncoderConfig
"""A configuration of any job."""

JOB_SCHEMAS: Mapping[str, type[JobConfig]] = {
    "evaluate": RunConfig,
    "latents": LatentsConfig,
    "train_encoder": TrainEncoderConfig,
}
"""The discriminated union over `job`."""

JOB_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"latents": LATENTS_DEFAULTS}
"""Sections of a job that take the place of absent ones before presets are merged in."""


def schema_of(data: Mapping[str, Any]) -> type[JobConfig]:
    """The schema of a configuration as it was read. ValueError for a job that does not exist."""
    job = data.get("job", "evaluate")
    if not isinstance(job, str) or job not in JOB_SCHEMAS:
        raise ValueError(unknown(f"job {job!r}", str(job), JOB_SCHEMAS))
    return JOB_SCHEMAS[job]

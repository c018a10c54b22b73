"""lrag-ray: batch generation and evaluation of long retrieval-augmented videos on Ray.

::

    import lrag_ray as lr

    config = lr.load_config("configs/demo.yaml")
    print(lr.plan(config).totals)
    lr.run(config)
    scores = lr.open_run(config.run.uri).scores()   # a pandas DataFrame

Importing this package is fast: everything is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrag_ray.api import Run as Run
    from lrag_ray.api import find_job as find_job
    from lrag_ray.api import follow_job as follow_job
    from lrag_ray.api import job_log as job_log
    from lrag_ray.api import jobs as jobs
    from lrag_ray.api import load_config as load_config
    from lrag_ray.api import open_run as open_run
    from lrag_ray.api import plan as plan
    from lrag_ray.api import prepare as prepare
    from lrag_ray.api import progress as progress
    from lrag_ray.api import run as run
    from lrag_ray.api import score as score
    from lrag_ray.api import stop_job as stop_job
    from lrag_ray.api import submit as submit
    from lrag_ray.api import write_report as write_report
    from lrag_ray.dataset import Dataset as Dataset

__version__ = "0.1.0"

NUMERICS_VERSION = 1
"""Raised whenever a change of code changes latents; part of every rollout key."""

__all__ = [
    "NUMERICS_VERSION",
    "Dataset",
    "Run",
    "__version__",
    "find_job",
    "follow_job",
    "job_log",
    "jobs",
    "load_config",
    "open_run",
    "plan",
    "prepare",
    "progress",
    "run",
    "score",
    "stop_job",
    "submit",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lrag_ray' has no attribute {name!r}")
    if name == "Dataset":
        from lrag_ray.dataset import Dataset

        return Dataset
    import lrag_ray.api

    return getattr(lrag_ray.api, name)


def __dir__() -> list[str]:
    return __all__

"""MLflow: one MLflow run per start, through the client alone, so that nothing global of the process changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrag_ray.config.redaction import redact
from lrag_ray.config.watch import MlflowSection
from lrag_ray.errors import RunEnvironmentError
from lrag_ray.events import RunEnded, RunState
from lrag_ray.watch.logger import RunLogger, library, run_name

_STATUS: dict[RunState, str] = {
    "done": "FINISHED", "incomplete": "FAILED", "interrupted": "KILLED", "failed": "FAILED",
}  # fmt: skip

_BATCH = 1000
"""Most metrics of one request that MLflow takes."""


class MlflowLogger(RunLogger):
    """Scalars over the seconds of the start, curves over the seconds of the video, the report as artifacts."""

    def __init__(self, section: MlflowSection, uri: str) -> None:
        """RunEnvironmentError where the library is missing or the tracking server refuses."""
        mlflow = library("mlflow.tracking", "watch.mlflow", "mlflow")
        self._entities = library("mlflow.entities", "watch.mlflow", "mlflow")
        try:
            self._client = mlflow.MlflowClient(tracking_uri=section.tracking_uri)
            found = self._client.get_experiment_by_name(section.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(section.experiment)
            self._id = self._client.create_run(
                experiment, run_name=section.name or run_name(uri), tags={"lrag_run": redact(uri)}
            ).info.run_id
        except Exception as error:
            # The library raises its own errors, and those of its HTTP client.
            raise RunEnvironmentError(
                f"watch.mlflow: the tracking server cannot be used: {redact(str(error))}. Fix: set "
                "watch.mlflow.tracking_uri or MLFLOW_TRACKING_URI, and its credentials in the environment"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """The step is the second of the start."""
        self._log([(name, value, step) for name, value in values.items()])

    def curve(self, name: str, points: Sequence[tuple[float, float]]) -> None:
        """The step is the second of the video."""
        self._log([(name, y, round(x)) for x, y in points])

    def _log(self, points: Sequence[tuple[str, float, int]]) -> None:
        now_ms = round(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now_ms, step) for name, value, step in points]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + _BATCH])

    def files(self, folder: Path) -> None:
        """Artifacts in ``report/``."""
        self._client.log_artifacts(self._id, str(folder), "report")

    def close(self, ended: RunEnded) -> None:
        """End the MLflow run."""
        self._client.set_tag(self._id, "state", ended.state)
        self._client.set_terminated(self._id, status=_STATUS[ended.state])

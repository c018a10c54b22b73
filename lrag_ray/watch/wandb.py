"""Weights & Biases: one W&B run per start, grouped by the run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lrag_ray.config.redaction import redact
from lrag_ray.config.watch import WandbSection
from lrag_ray.errors import RunEnvironmentError
from lrag_ray.events import RunEnded
from lrag_ray.watch.logger import RunLogger, library, run_name

_START_TIMEOUT_S = 60


class WandbLogger(RunLogger):
    """Scalars over the seconds of the start, curves over the seconds of the video, the report as an artifact."""

    def __init__(self, section: WandbSection, uri: str) -> None:
        """RunEnvironmentError where the library is missing, or W&B does not accept the key."""
        wandb = self._wandb = library("wandb", "watch.wandb", "wandb")
        if section.folder is not None:
            Path(section.folder).mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                name=section.name or run_name(uri),
                group=run_name(uri),
                mode=section.mode,
                dir=section.folder,
                config={"run": redact(uri)},
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    login_timeout=_START_TIMEOUT_S,
                    init_timeout=_START_TIMEOUT_S,
                    # Only what is logged here leaves: no command line, packages, git state or machine.
                    disable_git=True,
                    save_code=False,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                ),
            )
        except Exception as error:
            # The library raises its own errors, and those of its service.
            raise RunEnvironmentError(
                f"watch.wandb: W&B cannot be reached or refuses the key: {redact(str(error))}. Fix: set WANDB_API_KEY, "
                "or watch.wandb.mode: offline"
            ) from error
        self._run.define_metric("*", step_metric="seconds")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Over `seconds` of the start."""
        self._run.log({**values, "seconds": step})

    def curve(self, name: str, points: Sequence[tuple[float, float]]) -> None:
        """A curve over `video_s`."""
        self._run.define_metric(name, step_metric="video_s")
        for x, y in points:
            self._run.log({name: y, "video_s": x})

    def files(self, folder: Path) -> None:
        """An artifact of type report."""
        artifact = self._wandb.Artifact("report", type="report")
        for file in sorted(folder.iterdir()):
            artifact.add_file(str(file), name=file.name)
        self._run.log_artifact(artifact)

    def close(self, ended: RunEnded) -> None:
        """Finish the W&B run with the exit code of the start."""
        self._run.summary["state"] = ended.state
        self._run.finish(exit_code=ended.exit_code)

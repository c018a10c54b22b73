"""TensorBoard: event files in a folder of their own per start. Show them with ``tensorboard --logdir FOLDER``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrag_ray.config.watch import TensorBoardSection
from lrag_ray.errors import RunEnvironmentError
from lrag_ray.events import RunEnded
from lrag_ray.store.records import new_attempt_id
from lrag_ray.watch.logger import RunLogger, library, run_name


class TensorBoardLogger(RunLogger):
    """Scalars and curves as event files; the report lies beside them, in ``report/``."""

    def __init__(self, section: TensorBoardSection, uri: str) -> None:
        """RunEnvironmentError where the library is missing or the folder cannot be written."""
        self._folder = Path(section.folder) / f"{run_name(uri)}-{new_attempt_id()}"
        library("tensorboard", "watch.tensorboard", "tensorboard")
        writers = library("torch.utils.tensorboard", "watch.tensorboard", "tensorboard")
        try:
            self._writer = writers.SummaryWriter(str(self._folder))
        except OSError as error:
            raise RunEnvironmentError(
                f"watch.tensorboard.folder: {section.folder} cannot be written: {error.strerror}. Fix: name another"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """The step is the second of the start."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def curve(self, name: str, points: Sequence[tuple[float, float]]) -> None:
        """The step is the second of the video."""
        for x, y in points:
            self._writer.add_scalar(name, y, round(x))

    def files(self, folder: Path) -> None:
        """A copy of the report beside the event files."""
        shutil.copytree(folder, self._folder / "report", dirs_exist_ok=True)

    def close(self, ended: RunEnded) -> None:
        """Flush."""
        self._writer.add_text("state", f"{ended.state}, exit code {ended.exit_code}, {ended.uri}")
        self._writer.close()

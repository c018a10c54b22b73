"""What every logger of experiments gets of a start: progress, scores per cell, drift curves and the report.

A logger (TensorBoard, W&B, MLflow) is a `RunLogger` in a file of its own; `LoggedRun` is the listener that feeds it.
"""

from __future__ import annotations

import csv
import io
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lrag_ray.errors import RunEnvironmentError
from lrag_ray.events import CellScored, Event, ReportWritten, RunEnded
from lrag_ray.store.address import Storage
from lrag_ray.watch.tally import Tally

EVERY_S = 10.0
"""Time between two points of the progress curves."""


class RunLogger(ABC):
    """A destination. Methods may raise whatever the library raises: that ends the logger, not the run."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of each curve by name, at second `step` of the start, which never falls."""

    @abstractmethod
    def curve(self, name: str, points: Sequence[tuple[float, float]]) -> None:
        """A whole curve: seconds of the video, and the value there."""

    @abstractmethod
    def files(self, folder: Path) -> None:
        """The files of the report."""

    @abstractmethod
    def close(self, ended: RunEnded) -> None:
        """Nothing follows."""


class LoggedRun:
    """The listener that turns events into scalars, curves and files of a logger."""

    def __init__(self, logger: RunLogger, report: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        """`report` is the folder in which the start writes its report."""
        self._logger = logger
        self._report = report
        self._clock = clock
        self._tally = Tally()
        self._began_s = clock()
        self._next_s = 0.0

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        self._tally.count(event)
        now_s = self._clock() - self._began_s
        match event:
            case CellScored():
                cell = f"{event.backbone}/{event.method}/{event.duration_s:g}s"
                ranks = {} if event.average_rank is None else {"average_rank": event.average_rank}
                named = {f"scores/{cell}/{name}": value for name, value in {**event.means, **ranks}.items()}
                self._logger.scalars(named, round(now_s))
            case ReportWritten():
                self._log_report(event.files)
            case RunEnded():
                self._log_progress(now_s)
                self._logger.close(event)
                return
        if now_s >= self._next_s:
            self._next_s = now_s + EVERY_S
            self._log_progress(now_s)

    def _log_progress(self, now_s: float) -> None:
        tally = self._tally
        values = {
            "blocks": tally.blocks_done,
            "blocks_per_s": tally.blocks_per_s,
            "rollouts_done": tally.rollouts_done,
            "rollouts_running": len(tally.flights) if tally.stage == "rollouts" else 0,
            "rollouts_failed": tally.rollouts_quarantined,
            "failed_attempts": tally.failed_attempts,
            "videos_scored": tally.videos_scored,
            "stored_bytes": tally.stored_bytes,
        }
        named = {f"progress/{name}": value for name, value in values.items() if value is not None}
        self._logger.scalars(named, round(now_s))

    def _log_report(self, names: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory(prefix="lrag-report") as folder:
            for name in names:
                (Path(folder) / name).write_bytes(self._report.read_bytes(name))
            if "drift.csv" in names:
                for curve, points in drift_curves((Path(folder) / "drift.csv").read_text(encoding="utf-8")):
                    self._logger.curve(f"drift/{curve}", points)
            self._logger.files(Path(folder))


def drift_curves(text: str) -> Iterator[tuple[str, Sequence[tuple[float, float]]]]:
    """Curves of a report's drift.csv: cell and dimension, and (start of the clip in seconds, mean) in order."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        name = f"{row['backbone']}/{row['method']}/{float(row['duration_s']):g}s/{row['measure']}"
        curves.setdefault(name, []).append((float(row["start_s"]), float(row["in_clip"])))
    yield from curves.items()


def library(module: str, section: str, extra: str) -> ModuleType:
    """Import the library of a logger. RunEnvironmentError, with the extra to install, where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise RunEnvironmentError(
            f"{section} needs the package {extra}, which cannot be imported here ({error}). Fix: pip install "
            f"'lrag-ray[{extra}]', or remove the section"
        ) from error


def run_name(uri: str) -> str:
    """The last part of a run's address."""
    return uri.rstrip("/").rpartition("/")[2] or "run"

"""The `watch` section at work: every listener of a start, and its last event."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.redaction import redact
from lrag_ray.config.watch import WatchSection
from lrag_ray.engine.metrics import RunMetrics
from lrag_ray.errors import INTERRUPTED, LragError
from lrag_ray.events import Event, Listener, Notice, RunEnded, RunState
from lrag_ray.store.address import Storage
from lrag_ray.store.run_dir import SUMMARY
from lrag_ray.watch.background import BackgroundListener
from lrag_ray.watch.hook import EndHook
from lrag_ray.watch.logger import LoggedRun, RunLogger
from lrag_ray.watch.mlflow import MlflowLogger
from lrag_ray.watch.tensorboard import TensorBoardLogger
from lrag_ray.watch.wandb import WandbLogger

CLOSE_WITHIN_S = 120.0
"""What a logger may take at the end to send what it has."""
_REASONS = 10


class Watching:
    """The listeners of one start."""

    def __init__(self, config: JobConfig, listener: Listener) -> None:
        """`listener` is the caller's. Raises ConfigError and RunEnvironmentError where something cannot be watched."""
        self.exit_code: int | None = None
        """Of the start, once it is known."""
        self.missing: dict[str, str] = {}
        """What could not be made."""
        self._config = config
        self._listener = listener
        self._began = time.monotonic()
        watch = with_absolute_paths(config).watch
        # Before the loggers, so that it is checked before anything is begun anywhere.
        self._hook = EndHook(watch.on_end, self._warn) if watch.on_end is not None else None
        self._metrics: Listener | None = RunMetrics(watch.metrics_linger_s) if watch.metrics else None
        self._loggers: list[BackgroundListener] = []
        report = Storage(config.run.uri, config.storage).below(SUMMARY)
        for name, logger in _loggers(watch, config.run.uri):
            logged = LoggedRun(logger, report)
            self._loggers.append(BackgroundListener(f"watch.{name}", logged, self._warn))

    def report(self, event: Event) -> None:
        """Pass an event to all."""
        self._listener(event)
        if self._metrics is not None:
            try:
                self._metrics(event)
            except Exception as error:  # noqa: BLE001 - reported; numbers of Ray's must not end the run
                self._metrics = None
                self._warn(redact(f"watch.metrics: {type(error).__name__}: {error}. The run continues without them"))
        for logger in self._loggers:
            logger(event)

    def end(self, error: BaseException | None = None) -> None:
        """Send the last event, let the loggers finish, call the hook."""
        ended = RunEnded(
            job=self._config.job,
            uri=redact(self._config.run.uri),
            **_ending(self.exit_code, error),
            seconds=round(time.monotonic() - self._began, 3),
            missing=len(self.missing),
            reasons=tuple(f"{title}: {reason}" for title, reason in list(self.missing.items())[:_REASONS]),
        )
        self.report(ended)
        deadline = time.monotonic() + CLOSE_WITHIN_S
        try:
            for logger in self._loggers:
                logger.close(max(1.0, deadline - time.monotonic()))
        except KeyboardInterrupt:
            # The start has ended already, and its exit code is known.
            self._warn("interrupted: what the loggers had not sent is lost")
        if self._hook is not None:
            self._hook(ended)

    def _warn(self, text: str) -> None:
        self._listener(Notice(text, warning=True))


@contextmanager
def watching(config: JobConfig, listener: Listener) -> Iterator[Watching]:
    """Everything that `config.watch` asks for, for the time of the block, in which `exit_code` must be set.

    Raises ConfigError and RunEnvironmentError, before the block, for what cannot be watched. Afterwards nothing that
    a listener does reaches the start.
    """
    watched = Watching(config, listener)
    try:
        yield watched
    except BaseException as error:
        watched.end(error)
        raise
    watched.end()


def _loggers(watch: WatchSection, uri: str) -> Iterator[tuple[str, RunLogger]]:
    kinds: list[tuple[str, Any, Callable[[Any, str], RunLogger]]] = [
        ("tensorboard", watch.tensorboard, TensorBoardLogger),
        ("wandb", watch.wandb, WandbLogger),
        ("mlflow", watch.mlflow, MlflowLogger),
    ]
    for name, section, make in kinds:
        if section is not None:
            yield name, make(section, uri)


def _ending(exit_code: int | None, error: BaseException | None) -> dict[str, Any]:
    """State, exit code and error of `RunEnded`."""
    states: dict[int, RunState] = {0: "done", 1: "incomplete", INTERRUPTED: "interrupted"}
    if isinstance(error, KeyboardInterrupt):
        return {"state": "interrupted", "exit_code": INTERRUPTED, "error": None}
    if error is not None:
        code = error.exit_code if isinstance(error, LragError) else 1
        return {"state": "failed", "exit_code": code, "error": redact(f"{type(error).__name__}: {error}")}
    assert exit_code is not None, "a start that ended without an error has an exit code"
    return {"state": states[exit_code], "exit_code": exit_code, "error": None}

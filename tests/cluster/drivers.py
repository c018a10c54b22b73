"""Drivers in processes of their own: the real command, with a configuration file that a test wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from lrag_ray.config.schema import RunConfig
from tests.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def write_config(path: Path, config: RunConfig) -> Path:
    """`config` as the file that the command reads."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    return path


class Driver:
    """One ``lrag-ray`` and what it says, perhaps behind another program that prepares its surroundings."""

    def __init__(self, log: Path, *arguments: str, prefix: Sequence[str] = (), **environment: str) -> None:
        self._log = log
        own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "lrag_ray", *arguments],
                cwd=REPOSITORY,
                env={**own, "PYTHONPATH": str(REPOSITORY), **environment},
                stdout=file,
                stderr=file,
            )

    @property
    def text(self) -> str:
        """All that it wrote so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = 400) -> int:
        """Exit code."""
        try:
            return self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the driver did not end in {timeout_s} s: {self.text}")

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 400) -> None:
        """Wait for something that the driver brings about; fails when it ends first."""
        wait_until(lambda: self.process.poll() is not None or condition(), timeout_s, said=lambda: self.text)
        assert self.process.poll() is None or condition(), f"it ended with {self.process.returncode}: {self.text}"


@contextmanager
def command(log: Path, *arguments: str, prefix: Sequence[str] = (), **environment: str) -> Iterator[Driver]:
    """A command that is gone after the block, with all processes that it started."""
    started = Driver(log, *arguments, prefix=prefix, **environment)
    try:
        yield started
    finally:
        left = []
        with suppress(psutil.NoSuchProcess):
            left = psutil.Process(started.process.pid).children(recursive=True)
        started.process.kill()
        started.process.wait()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def driver(config: Path) -> AbstractContextManager[Driver]:
    """``lrag-ray run`` with a configuration."""
    return command(config.with_suffix(f".{time.monotonic_ns()}.log"), "run", str(config))


def actors_below(pid: int) -> list[psutil.Process]:
    """Actors of the pool among the processes that `pid` started, and those that they started."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "StageActor" in " ".join(process.cmdline()):
                    found.append(process)
    return found

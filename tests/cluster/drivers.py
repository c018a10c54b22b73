"""Drivers in processes of their own: the real command, with a configuration file that a test wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from lrag_ray.config.schema import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def write_config(path: Path, config: RunConfig) -> Path:
    """`config` as the file that the command reads."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    return path


class Driver:
    """One ``lrag-ray run`` and what it says."""

    def __init__(self, config: Path) -> None:
        self._log = config.with_suffix(f".{time.monotonic_ns()}.log")
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lrag_ray", "run", str(config)],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=log,
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

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 400) -> None:
        """Wait for something that the driver brings about; fails when it ends first."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None and not condition():
                pytest.fail(f"the driver ended with {self.process.returncode}: {self.text}")
            if time.monotonic() > deadline:
                pytest.fail(f"it did not happen in {timeout_s} s: {self.text}")
            time.sleep(0.05)


@contextmanager
def driver(config: Path) -> Iterator[Driver]:
    """A driver that is gone after the block, with all processes that it started."""
    started = Driver(config)
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


def actors_below(pid: int) -> list[psutil.Process]:
    """Actors of the pool among the processes that `pid` started, and those that they started."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "StageActor" in " ".join(process.cmdline()):
                    found.append(process)
    return found

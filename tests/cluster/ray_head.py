"""A real Ray head with its dashboard, made by `ray start --head`: ports and folder of its own, asking for a token."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lrag_ray.engine.ray_jobs.client import connect
from lrag_ray.errors import LragError
from tests.conftest import REPOSITORY

_START_S = 240.0
_TRIES = 3


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


class RayHead:
    """A head that can be killed and started again at the same address."""

    def __init__(self, cpus: int = 4) -> None:
        # That of the test session, which clients in this process send too.
        self.token = os.environ["RAY_AUTH_TOKEN"]
        self._cpus = cpus
        self.gcs, dashboard, self._agent, self._client = free_ports(4)
        self.url = f"http://127.0.0.1:{dashboard}"
        self._folder = tempfile.TemporaryDirectory(prefix="lr", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name).with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: list[psutil.Process] = []

    @property
    def environment(self) -> Mapping[str, str]:
        """Of a client: without an address, with the token."""
        without = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
        return {**without, "PYTHONPATH": str(REPOSITORY)}

    def start(self) -> None:
        """Start it and wait until it takes jobs; a head that ends on a busy machine is started again."""
        for _ in range(_TRIES):
            if self._started():
                return
            self.kill()
        pytest.fail(f"no head: {self._log.read_text(encoding='utf-8', errors='replace')}")

    def _started(self) -> bool:
        program = Path(sys.executable).parent
        environment = {
            **self.environment,
            "RAY_AUTH_MODE": "token",
            "PATH": f"{program}{os.pathsep}{os.environ['PATH']}",
        }
        command = [
            str(program / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1", f"--port={self.gcs}", f"--dashboard-port={self.url.rsplit(':', 1)[1]}",
            f"--dashboard-agent-listen-port={self._agent}", f"--ray-client-server-port={self._client}",
            f"--num-cpus={self._cpus}", f"--temp-dir={self._folder.name}",
        ]  # fmt: skip
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=self._folder.name
            )
        deadline = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(LragError):
                client = connect(self.url)
                job_id = f"ready-{time.monotonic_ns()}"
                client.submit(job_id, "true", {}, {})
                while not client.job(job_id).ended:
                    time.sleep(0.5)
                return True
            time.sleep(0.5)
        return False

    def processes(self) -> list[psutil.Process]:
        """All processes of the head, jobs included."""
        assert self._process is not None
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            self._seen = [*{*self._seen, own, *own.children(recursive=True)}]
        return self._seen

    def kill(self) -> None:
        """What a lost machine does: everything of it is gone at once."""
        if self._process is None:
            return
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(self._seen, timeout=30)
        self._seen = []
        self._process = None

    def close(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        self._folder.cleanup()
        self._log.unlink(missing_ok=True)

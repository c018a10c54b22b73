"""Ray clusters of several nodes on this machine: every node is a raylet with processes of its own, which can be killed.

The head has no CPUs, so actors live on the other nodes, and its death is a test of its own.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from ray._common.utils import get_default_ray_temp_dir
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster

from tests.cluster.drivers import actors_below
from tests.waiting import wait_until

T = TypeVar("T")
_MARK = "LRAG_TEST_CLUSTER"

_NOTICE_DEATHS_QUICKLY = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    # A raylet that was killed refuses at once; one that is only slow answers some time.
    "health_check_timeout_ms": 30000,
    "health_check_failure_threshold": 3,
}


class PatientCluster(Cluster):  # type: ignore[misc]
    """Ray's cluster of several nodes, on a machine that may be slow."""

    def add_node(self, wait: bool = True, **node_args: Any) -> Any:
        # Ray notes the head's address there, and only a node without a folder of its own makes it.
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
        return patiently(lambda: super(PatientCluster, self).add_node(wait, **node_args))

    def _wait_for_node(self, node: Any, timeout: float = 30) -> None:
        super()._wait_for_node(node, timeout=10 * timeout)


class Nodes:
    """A head without CPUs, and nodes that come and go. To be used from the main thread."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._cluster: Cluster | None = None
        self.start_head()

    @property
    def address(self) -> str:
        """What ``engine.address`` is to be."""
        assert self._cluster is not None
        return str(self._cluster.address)

    def actors(self) -> list[psutil.Process]:
        """Actors of the pool on all nodes."""
        return [actor for node in self.alive for actor in actors_on(node)]

    @property
    def alive(self) -> list[Any]:
        """Nodes besides the head."""
        assert self._cluster is not None
        return sorted(self._cluster.worker_nodes, key=raylet)

    def start_head(self) -> None:
        """A new head; after `kill_head` that is another cluster."""
        head = {
            "num_cpus": 0,
            "temp_dir": self._folder,
            "include_dashboard": False,
            "_system_config": _NOTICE_DEATHS_QUICKLY,
        }
        self._cluster = PatientCluster(initialize_head=True, head_node_args=head)

    def add(self, cpus: int = 1) -> Any:
        """A node joins."""
        assert self._cluster is not None
        return self._cluster.add_node(num_cpus=cpus)

    def kill(self, node: Any) -> None:
        """SIGKILL to a node's raylet and all below it, as when a machine loses its power."""
        assert self._cluster is not None
        below = psutil.Process(raylet(node)).children(recursive=True)
        self._cluster.remove_node(node, allow_graceful=False)
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for_end(below)

    def kill_head(self) -> None:
        """SIGKILL to the head with all that it knew; the other nodes go as well, as they do without a head."""
        assert self._cluster is not None
        self.kill(self._cluster.head_node)
        for node in self.alive:
            self.kill(node)

    def shutdown(self) -> None:
        """End all nodes."""
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None


def raylet(node: Any) -> int:
    """Process id of a node's raylet, the parent of its workers."""
    return int(node.all_processes["raylet"][0].process.pid)


def actors_on(node: Any) -> list[psutil.Process]:
    """Actors of the pool on a node, at work or not."""
    return actors_below(raylet(node))


def wait_for_end(processes: Iterable[psutil.Process], timeout_s: float = 120) -> None:
    """Wait until all have ended, whether or not someone has reaped them."""
    processes = list(processes)
    wait_until(lambda: not any(map(is_alive, processes)), timeout_s, said=lambda: f"of {processes}, some live on")


def is_alive(process: psutil.Process) -> bool:
    """Whether a process can still do something, now or when it is woken up."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    return False


def is_at_work(actor: psutil.Process) -> bool:
    """Whether an actor is doing a task at this moment (Ray writes it into the process's title)."""
    with suppress(psutil.NoSuchProcess):
        return "StageActor.work" in " ".join(actor.cmdline())
    return False


@contextmanager
def nodes() -> Iterator[Nodes]:
    """A cluster without nodes yet; see `private_folder`."""
    with private_folder() as folder:
        cluster = Nodes(folder)
        try:
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def private_folder() -> Iterator[str]:
    """A folder for a cluster; fails if a process that was started within the block is left at its end."""
    # As a local `ray.init` does: the clusters ask for the token of this session (see tests/conftest.py).
    enable_token_auth_by_default()
    mark = secrets.token_hex(8)
    os.environ[_MARK] = mark
    try:
        # Ray's sockets are below its folder and their paths may have 107 characters.
        with tempfile.TemporaryDirectory(prefix="lr", ignore_cleanup_errors=True) as folder:
            yield folder
    finally:
        del os.environ[_MARK]
        left = _marked(mark)
        deadline = time.monotonic() + 30
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            left = _marked(mark)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    if left:
        pytest.fail(f"processes are left: {left}")


@contextmanager
def ray_start(*arguments: str, prefix: Sequence[str] = (), **environment: str) -> Iterator[psutil.Process]:
    """``ray start --block``: a node (or a head) as people start it, once it says that it runs; its raylet."""
    command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*command, *arguments], env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        said = b""
        for line in process.stdout:
            said += line
            if b"Ray runtime started" in line:
                return process
        process.wait()
        process.stdout.close()
        raise RuntimeError(f"ray start came to nothing: {said.decode(errors='replace')}")

    with patiently(start) as process:
        try:
            (raylet,) = _children_named(process.pid, "raylet")
            yield raylet
        finally:
            if process.poll() is not None:
                print(f"ray start ended with {process.returncode}: {process.communicate()[0].decode()}")
            started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            # What it started is ended here and not by itself, which may wait for a node that does not answer.
            for child in [*started, process]:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def patiently(start: Callable[[], T]) -> T:
    """Do `start` again where Ray gave a node up because it was not there within half a minute, which cannot be set."""
    for _ in range(2):
        before = psutil.Process().children()
        try:
            return start()
        except Exception as error:
            # Ray raises no other.
            if "timed out during startup" not in str(error):
                raise
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                for process in [*child.children(recursive=True), child] if child not in before else ():
                    process.kill()
    return start()


def free_port() -> int:
    """A port that nobody listens on, and that neither the system nor Ray gives to anybody before it is used."""
    # Below are the ports of Ray's workers, above those that the system deals out.
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port
    raise AssertionError("of a hundred ports none is free")


def _children_named(pid: int, name: str) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(pid).children(recursive=True) if child.name() == name]
    return []


def _marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited the mark of a cluster."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found

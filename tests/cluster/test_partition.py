"""A node that the network cuts off: Ray calls it dead, and its actor goes on writing to the storage that it still sees.

Every node lives in a network namespace of its own, joined by a bridge; cutting one off is taking its link down. Needs
root and ``ip``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.drivers import actors_below, driver, write_config
from tests.cluster.nodes import free_port, is_alive, private_folder, ray_start
from tests.cluster.quiet import Gate, assert_equal, attempts, by_horizon, make_config, open_parts, quiet_run
from tests.waiting import wait_until

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(600)]

DEATHS_QUICKLY = (
    '{"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 4000, '
    # A node that is cut off ends itself after this; by then a slow machine may not have finished the run.
    '"health_check_failure_threshold": 3, "gcs_rpc_server_reconnect_timeout_s": 600}'
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """A bridge with this machine at .1, and namespaces at .2 and .3."""

    def __init__(self) -> None:
        self._id = secrets.token_hex(2)
        self.bridge = f"lrb{self._id}"
        # Two test sessions on one machine must not take the same addresses.
        self.addresses = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"

    def start(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.addresses}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for host in (2, 3):
            space, link = self.space(host), self._link(host)
            ip("netns", "add", space)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", link, "master", self.bridge, "up")
            ip("-n", space, "addr", "add", f"{self.addresses}.{host}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def cut_off(self, host: int) -> None:
        ip("link", "set", self._link(host), "down")

    def remove(self) -> None:
        for host in (2, 3):
            subprocess.run(["ip", "netns", "del", self.space(host)], capture_output=True)
            subprocess.run(["ip", "link", "del", self._link(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def space(self, host: int) -> str:
        return f"lr{self._id}-{host}"

    def _link(self, host: int) -> str:
        return f"lrv{self._id}{host}"


@contextmanager
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    made = Network()
    try:
        try:
            made.start()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def test_a_cut_off_node_that_writes_on_does_no_harm(tmp_path: Path) -> None:
    quiet = quiet_run(make_config(tmp_path / "quiet", prompts=2, gates=[Gate(tmp_path / "open", opened=True)]))
    port = free_port()
    with network() as net, private_folder() as folder:
        address = f"{net.addresses}.1:{port}"
        store = "--object-store-memory=157286400"
        head = ["--head", f"--node-ip-address={net.addresses}.1", f"--port={port}", "--num-cpus=0", store]
        head += [f"--temp-dir={folder}", "--include-dashboard=false", f"--system-config={DEATHS_QUICKLY}"]

        def node(host: int) -> list[str]:
            return [f"--address={address}", f"--node-ip-address={net.addresses}.{host}", "--num-cpus=1", store]

        with ray_start(*head), ray_start(*node(2), prefix=["ip", "netns", "exec", net.space(2)]) as first:
            gate = Gate(tmp_path / "gate")
            config = make_config(tmp_path / "run", address, prompts=2, gates=[gate], engine={"actors": 1})
            run = RolloutRun(config.run.uri)
            with driver(write_config(tmp_path / "config.yaml", config)) as started:
                started.wait_until(lambda: bool(open_parts(run)))
                (actor,) = actors_below(first.pid)
                actor.suspend()
                gate.open()
                (attempt,) = {path.rsplit("/", 1)[0] for path in open_parts(run)}
                before = run.storage.list_files(attempt).keys()
                with ray_start(*node(3), prefix=["ip", "netns", "exec", net.space(3)]):
                    net.cut_off(2)
                    done = len(run.commits())
                    started.wait_until(lambda: len(run.commits()) > done)
                    # The other node continues with its rollout; only now the one that was cut off wakes up, and writes.
                    actor.resume()
                    wait_until(lambda: run.storage.list_files(attempt).keys() > before)
                    assert started.wait() == 0, started.text
                    time.sleep(1)
                    assert is_alive(actor), "it was not cut off"
    assert_equal(run, quiet)
    assert any(len(attempts(commit)) > 1 for commit in by_horizon(run).values())

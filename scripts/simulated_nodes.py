"""A Ray cluster of simulated nodes on this machine, for the tutorial docs/first-hour.md: nodes join and are lost.

Run as ``python scripts/simulated_nodes.py up 6``, then ``add 2``, ``lose 1`` and ``down``. The head has no CPUs and
runs the job server; every node is a `ray start` of one CPU, which stands for a GPU. The cluster asks for a token of its
own. ``env.sh`` in its folder (``--folder``, by default runs/simulated) sets the token and the addresses: LRAG_HEAD, as
`engine.address` takes it, and LRAG_JOBS, as `--address` of a submit does.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.util

# Ray brings it.
import psutil  # isort: skip

_SLOT_PORTS = 100
_FIRST_PORT = 22_000
_DASHBOARD_PORT = 8265
_START_TRIES = 6
_STARTED_WITHIN_S = 180.0


class Nodes:
    """What runs, as ``state.json`` in the folder remembers it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "state.json"
        self.state: dict[str, Any] = {}
        if self._file.is_file():
            self.state = json.loads(self._file.read_text(encoding="utf-8"))

    @property
    def running(self) -> dict[str, int]:
        """Process ids of the `ray start` of nodes that are alive, by number."""
        return {name: pid for name, pid in self.state.get("nodes", {}).items() if _is_ours(pid, self.folder)}

    def up(self, count: int) -> None:
        """Start the head and `count` nodes."""
        if self.state:
            sys.exit(f"error: {self.folder} has a cluster already. Fix: python scripts/simulated_nodes.py down")
        for port in (_FIRST_PORT + 7, _DASHBOARD_PORT):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    sys.exit(f"error: port {port} is taken, by another cluster perhaps. Fix: end it (`ray stop`)")
        self.folder.mkdir(parents=True, exist_ok=True)
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        address = f"{_node_ip()}:{_FIRST_PORT + 7}"
        # Ray's sockets have paths of at most 107 characters.
        temporary = tempfile.mkdtemp(prefix="lrag")
        self.state = {"address": address, "temporary": temporary, "nodes": {}, "next": 1}
        self._write()
        head = [
            "--head",
            f"--port={_FIRST_PORT + 7}",
            f"--ray-client-server-port={_FIRST_PORT + 8}",
            f"--dashboard-port={_DASHBOARD_PORT}",
            "--num-cpus=0",
            f"--temp-dir={temporary}",
        ]
        try:
            self.state["head"] = self._start("head", 0, head)
            self._write()
            self.add(count)
        except (SystemExit, KeyboardInterrupt):
            self.down()
            raise
        (self.folder / "env.sh").write_text(
            f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token.absolute()}\n"
            f"export LRAG_HEAD={address} LRAG_JOBS=http://127.0.0.1:{_DASHBOARD_PORT}\n",
            encoding="utf-8",
        )
        print(f"source {self.folder / 'env.sh'}")

    def add(self, count: int) -> None:
        """Let `count` nodes join."""
        self._require()
        for _ in range(count):
            number = self.state["next"]
            self.state["next"] += 1
            # A folder each, as machines have: in one for all, nodes that install the code of a job at the same time
            # remove each other's files.
            temporary = f"--temp-dir={self.state['temporary']}/{number}"
            options = [f"--address={self.state['address']}", "--num-cpus=1", temporary]
            self.state["nodes"][str(number)] = self._start(f"node {number}", number, options)
            self._write()

    def lose(self, number: int) -> None:
        """SIGKILL to all processes of a node, as when a machine loses its power."""
        self._require()
        if str(number) not in self.running:
            sys.exit(f"error: no node {number} runs; there are {', '.join(self.running) or 'none'}")
        _kill(self.state["nodes"].pop(str(number)))
        self._write()
        print(f"node {number} is gone")

    def down(self) -> None:
        """End all of it."""
        self._require()
        for pid in [*self.running.values(), self.state.get("head", 0)]:
            if _is_ours(pid, self.folder):
                _kill(pid)
        shutil.rmtree(self.state["temporary"], ignore_errors=True)
        for name in ("state.json", "token", "env.sh"):
            (self.folder / name).unlink(missing_ok=True)
        print("the cluster is gone")

    def _require(self) -> None:
        if not self.state:
            sys.exit("error: there is no cluster. Fix: python scripts/simulated_nodes.py up 6")

    def _write(self) -> None:
        self._file.write_text(json.dumps(self.state), encoding="utf-8")

    def _start(self, name: str, slot: int, options: list[str]) -> int:
        """Process id of a `ray start --block` that runs. Ray gives it half a minute; a busy machine may need more."""
        first = _FIRST_PORT + _SLOT_PORTS * slot
        ports = {
            "node-manager": 1, "object-manager": 2, "runtime-env-agent": 3, "dashboard-agent-listen": 4,
            "dashboard-agent-grpc": 5, "metrics-export": 6, "min-worker": 10, "max-worker": 99,
        }  # fmt: skip
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
        command += [f"--{port}-port={first + offset}" for port, offset in ports.items()]
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str((self.folder / "token").absolute()),
            "RAY_USAGE_STATS_ENABLED": "0",
            # So that the job's `python` is this one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        for variable in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
            environment.pop(variable, None)
        log = self.folder / f"{name.replace(' ', '-')}.log"
        for _ in range(_START_TRIES):
            with log.open("wb") as output:
                started = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            deadline = time.monotonic() + _STARTED_WITHIN_S
            while started.poll() is None and time.monotonic() < deadline:
                if b"Ray runtime started" in log.read_bytes():
                    print(f"{name} runs", file=sys.stderr)
                    return started.pid
                time.sleep(0.2)
            _kill(started.pid)
        sys.exit(f"error: {name} does not start, see {log}")


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())


def _is_ours(pid: int, folder: Path) -> bool:
    with suppress(psutil.Error):
        token = psutil.Process(pid).environ().get("RAY_AUTH_TOKEN_PATH", "")
        return Path(token).parent == folder.absolute()
    return False


def _kill(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python scripts/simulated_nodes.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/simulated"))
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("up", help="start the head and COUNT nodes").add_argument("count", type=int)
    actions.add_parser("add", help="let COUNT nodes join").add_argument("count", type=int)
    actions.add_parser("lose", help="kill node NUMBER").add_argument("number", type=int)
    actions.add_parser("down", help="end the cluster")
    given = parser.parse_args()
    nodes = Nodes(given.folder)
    match given.action:
        case "up":
            nodes.up(given.count)
        case "add":
            nodes.add(given.count)
        case "lose":
            nodes.lose(given.number)
        case "down":
            nodes.down()


if __name__ == "__main__":
    main()

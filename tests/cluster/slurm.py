"""A real Slurm on this machine: munged, slurmctld and several slurmd, in a folder and on ports of their own.

Needs Debian's packages slurm-wlm and munge, and root, as slurmd does; nothing is installed or configured for others.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.cluster.nodes import free_port
from tests.waiting import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "scontrol", "srun")


def skip_without_slurm() -> None:
    """Skip, with what is missing."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd must be started by root")


class Slurm:
    """A cluster of nodes n1, n2, … with `cpus` each."""

    def __init__(self, folder: Path, nodes: int, cpus: int) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._nodes, self._cpus = nodes, cpus

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        folder, nodes = self.folder, self._nodes
        self._write_configuration(nodes, self._cpus)
        self._start("munged", "--foreground", "--force", *self._munge_options())
        self._wait(lambda: (folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-i")
        for number in range(1, nodes + 1):
            self.start_node(f"n{number}")
        self._wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == str(nodes))

    def start_node(self, name: str) -> None:
        """A node comes (back)."""
        self._start("slurmd", "-D", "-N", name, key=name)

    def kill_node(self, name: str) -> None:
        """SIGKILL to a node's daemon and to all that runs on it, as when a machine loses its power."""
        daemon = self._daemons.pop(name)
        # Job steps are children of init, and carry the name of their node. Whoever looks after them goes first, or it
        # would report their end, which a machine without power does not.
        steps = [process for process in psutil.process_iter() if self._is_on(process, name)]
        keepers = {keeper for step in steps for keeper in _parents(step) if "slurmstepd" in " ".join(keeper.cmdline())}
        for process in [psutil.Process(daemon.pid), *keepers, *steps]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()

    def run(
        self, program: str, *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(
            [program, *arguments],
            env=self.environment | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{program} {arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self, job: str) -> dict[str, str]:
        """State by task of an array, or of the job itself, while Slurm knows them."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T %N", check=False).splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def node_of(self, job: str) -> str:
        """Node that a running job (``12_3``: task of an array) is on."""
        return self.run("squeue", "-h", "-j", job, "-o", "%N").strip()

    @property
    def environment(self) -> dict[str, str]:
        """Of Slurm's commands; no variables of a job that we may be in."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_ADDRESS"))}
        return own | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
            self._wait(lambda: not self.run("squeue", "-h", check=False).strip(), 60)
        for daemon in reversed(self._daemons.values()):
            below = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
            for process in [daemon, *below]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            daemon.wait()
        # What jobs left: nothing here tracks processes as cgroups do.
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                    process.kill()

    def log(self) -> str:
        """What the daemons wrote, for messages."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.log")
        )

    def _is_on(self, process: psutil.Process, node: str) -> bool:
        with suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                return environment.get("SLURMD_NODENAME") == node
        return False

    def _start(self, program: str, *arguments: str, key: str = "") -> None:
        path = _program(program)
        assert path is not None, f"{program} is not installed"
        with (self.folder / f"{key or program}.log").open("ab") as log:
            self._daemons[key or program] = subprocess.Popen(
                [path, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        wait_until(condition, timeout_s, every_s=0.2, said=self.log)

    def _munge_options(self) -> Sequence[str]:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        return [
            f"--{option}={self.folder / name}"
            for option, name in (
                ("key-file", "munge.key"), ("socket", "munge.socket"), ("pid-file", "munged.pid"),
                ("seed-file", "munge.seed"), ("log-file", "munged.file.log"),
            )
        ]  # fmt: skip

    def _write_configuration(self, nodes: int, cpus: int) -> None:
        host, folder = socket.gethostname(), self.folder
        for number in range(1, nodes + 1):
            (folder / f"n{number}").mkdir()
        (folder / "state").mkdir()
        lines = [
            "ClusterName=here",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            "CryptoType=crypto/munge",
            # A requeued job waits as long as credentials live, two minutes unless this says otherwise: before then a
            # node takes the new one for that of the job that it has just ended, and the job fails.
            f"AuthInfo=socket={folder / 'munge.socket'},cred_expire=15",
            f"StateSaveLocation={folder / 'state'}",
            f"SlurmdSpoolDir={folder}/%n",
            f"SlurmdPidFile={folder}/%n.pid",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SchedulerType=sched/builtin",
            "SelectType=select/cons_res",
            "SelectTypeParameters=CR_Core",
            "GresTypes=gpu",
            "MpiDefault=none",
            "JobRequeue=1",
            "ReturnToService=2",
            "KillWait=30",
            "SlurmdTimeout=20",
            "SlurmctldTimeout=60",
            "MinJobAge=600",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
        ]
        lines += [
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={cpus} "
            "RealMemory=2000 Gres=gpu:1 State=UNKNOWN"
            for number in range(1, nodes + 1)
        ]
        lines.append(f"PartitionName=all Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        # Pretended GPUs: a device file that every machine has.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\n")


@contextmanager
def slurm(folder: Path, nodes: int = 4, cpus: int = 2) -> Iterator[Slurm]:
    """A running Slurm; all its processes are gone afterwards."""
    running = Slurm(folder, nodes, cpus)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def _parents(process: psutil.Process) -> Sequence[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.parents())
    return []


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")

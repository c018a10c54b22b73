"""The job scripts of cluster/slurm on a real Slurm: nodes are killed, told to leave, queued again; the head, too."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.drivers import REPOSITORY, actors_below, write_config
from tests.cluster.nodes import free_port
from tests.cluster.quiet import Gate, assert_equal, make_config, open_parts, quiet_run
from tests.cluster.slurm import Slurm, skip_without_slurm, slurm
from tests.waiting import wait_until

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(1800)]

DRAIN_S = 10
"""Rollouts that wait at a gate cannot be stored, so leaving workers use all of it."""
SCRIPTS = REPOSITORY / "cluster" / "slurm"


class Jobs:
    """Jobs of the scripts, with settings for small nodes, and their logs."""

    def __init__(self, running: Slurm, folder: Path) -> None:
        self.slurm = running
        self.folder = folder
        # The folders of the program and of the virtual environment are those of this test.
        self.settings = {
            "LRAG_CLUSTER": str(folder / "cluster"),
            "LRAG_PORT_BASE": str(free_port()),
            "LRAG_DASHBOARD_PORT": str(free_port()),
            "LRAG_DRAIN_S": str(DRAIN_S),
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def submit(self, *options: str, script: str, arguments: tuple[str, ...] = ()) -> str:
        """Job id."""
        log = f"--output={self.folder / script}-%j.log"
        small = ["--mem=100", "--cpus-per-task=1", log, f"--chdir={REPOSITORY}"]
        return self.slurm.run(
            "sbatch", "--parsable", *small, *options, str(SCRIPTS / script), *arguments, environment=self.settings
        ).strip()

    def until(self, what: str, condition: Callable[[], bool], timeout_s: float = 600) -> None:
        """Wait for something that jobs bring about."""

        def said() -> str:
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))
            return f"{what}\n{logs}\n{self.slurm.log()}"

        wait_until(condition, timeout_s, every_s=0.5, said=said)

    def at_work(self) -> set[int]:
        """Actors on all nodes."""
        return {
            actor.pid
            for process in psutil.process_iter(["name"])
            if process.info["name"] == "raylet" and str(self.folder) in process_environment(process, "LRAG_CLUSTER")
            for actor in actors_below(process.pid)
        }

    def queued_again(self, job: str) -> None:
        """Wait until a job that ended was queued again; Slurm then starts it by itself."""
        self.until("it was queued again", lambda: self.slurm.states(job).get(job) == "PENDING")

    def log(self, script: str) -> str:
        """All that the jobs of a script wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"{script}-*.log")))


def process_environment(process: psutil.Process, name: str) -> str:
    try:
        return process.environ().get(name, "")
    except psutil.Error:
        return ""


def test_a_run_survives_its_nodes_and_its_head(tmp_path: Path) -> None:
    skip_without_slurm()
    quiet = quiet_run(make_config(tmp_path / "quiet", prompts=2, gates=[Gate(tmp_path / "opened", opened=True)]))
    gate = Gate(tmp_path / "gate")
    config = make_config(tmp_path / "run", prompts=2, gates=[gate], engine={"actors": {"min": 1, "max": 3}})
    run = RolloutRun(config.run.uri)
    file = write_config(tmp_path / "config.yaml", config)
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", nodes=4) as running:
        jobs = Jobs(running, tmp_path)
        head = jobs.submit(script="head.sbatch", arguments=(str(file),))
        jobs.until("the head runs", lambda: running.states(head).get(head) == "RUNNING")
        jobs.until("the head answers", lambda: "submit to http://" in jobs.log("head.sbatch"))
        # One after the other (%1 below): nodes that start side by side on one machine take each other's time.
        workers = jobs.submit("--array=1-3%1", "--gres=gpu:1", script="workers.sbatch")
        for count in (1, 2, 3):
            running.run("scontrol", "update", f"JobId={workers}", f"ArrayTaskThrottle={count}")
            jobs.until(f"{count} actors", lambda count=count: len(jobs.at_work()) == count)  # type: ignore[misc]
        # Of each prompt a rollout waits at the gate with a part behind it.
        jobs.until("parts are stored", lambda: len(open_parts(run)) >= 2)

        # One receives TERM and leaves; another reaches its time limit and is requeued.
        running.run("scancel", "--batch", "--signal=TERM", f"{workers}_1")
        jobs.until("it left", lambda: running.states(workers).get(f"{workers}_1") == "COMPLETED")
        running.run("scancel", "--batch", "--signal=USR1", f"{workers}_2")
        jobs.queued_again(f"{workers}_2")
        assert jobs.log("workers.sbatch").count(f"leaving; up to {DRAIN_S} s to store") == 2

        # A machine loses its power: Slurm queues its worker again, and it comes back with the machine.
        lost = running.node_of(f"{workers}_3")
        assert lost != running.node_of(head)
        running.kill_node(lost)
        jobs.until("it was noticed", lambda: running.states(workers).get(f"{workers}_3") != "RUNNING")
        running.start_node(lost)
        jobs.queued_again(f"{workers}_3")
        jobs.until("two actors again", lambda: len(jobs.at_work()) >= 2)

        # The head is out of time: the driver stores what it knows, both are queued again, workers join the new head.
        running.run("scancel", "--batch", "--signal=USR1", head)
        jobs.until("the driver ended", lambda: "ended with 130" in jobs.log("head.sbatch"))
        jobs.queued_again(head)
        jobs.until("the head is back", lambda: jobs.log("head.sbatch").count("submit to http://") == 2)
        jobs.until("actors again", lambda: len(jobs.at_work()) >= 1)
        gate.open()
        jobs.until("the end", lambda: running.states(head).get(head) in ("COMPLETED", "FAILED"))
        assert running.states(head)[head] == "COMPLETED", jobs.log("head.sbatch")
        # Workers end with the cluster, and need not be cancelled.
        jobs.until("workers ended", lambda: set(running.states(workers).values()) <= {"COMPLETED", "PENDING"})
    assert_equal(run, quiet)


def test_one_allocation_stores_and_continues_where_its_time_is_over(tmp_path: Path) -> None:
    skip_without_slurm()
    gates = {name: Gate(tmp_path / name, opened=name == "opened") for name in ("opened", "gate")}
    quiet = quiet_run(make_config(tmp_path / "quiet", prompts=1, gates=[gates["opened"]]))
    config = make_config(tmp_path / "run", prompts=1, gates=[gates["gate"]], engine={"actors": 2})
    file = str(write_config(tmp_path / "config.yaml", config))
    (tmp_path / "slurm").mkdir()
    with slurm(tmp_path / "slurm", nodes=2) as running:
        jobs = Jobs(running, tmp_path)
        job = jobs.submit("--nodes=2", "--gres=gpu:1", script="one.sbatch", arguments=(file,))
        jobs.until("a rollout waits", lambda: len(open_parts(RolloutRun(config.run.uri))) == 1)
        assert jobs.log("one.sbatch").count("joining ") >= 2
        running.run("scancel", "--batch", "--signal=USR1", job)
        jobs.queued_again(job)
        log = jobs.log("one.sbatch")
        assert log.count(f"leaving; up to {DRAIN_S} s to store") == 2
        assert log.rindex("ray start ended with") < log.index("ended with 130"), "workers first"
        gates["gate"].open()
        jobs.until("the end", lambda: running.states(job).get(job) in ("COMPLETED", "FAILED"))
        assert running.states(job)[job] == "COMPLETED", jobs.log("one.sbatch")
        # A run that cannot be done has the exit code of the run.
        wrong = jobs.submit("--nodes=2", "--gres=gpu:1", script="one.sbatch", arguments=("/no/such/file.yaml",))
        jobs.until("the wrong one ended", lambda: running.states(wrong).get(wrong) == "FAILED")
        assert "ExitCode=2:0" in running.run("scontrol", "show", "job", wrong)
    assert_equal(RolloutRun(config.run.uri), quiet)

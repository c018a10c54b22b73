"""Jobs on a real head: submitted, followed, stopped and lost, through the real command. It asks for a token.

One head serves all checks; it is killed and started again at the end.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrag_ray.engine.ray_jobs.client import JobClient, RayJob, UnknownJobError
from lrag_ray.engine.ray_jobs.dashboard import Dashboard, find_token
from lrag_ray.engine.ray_jobs.log import JobLog
from lrag_ray.pipelines.submit.follow import follow, stop
from lrag_ray.pipelines.submit.submit import submitted
from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.cutting_proxy import CuttingProxy
from tests.cluster.quiet import open_parts
from tests.cluster.ray_head import RayHead
from tests.conftest import REPOSITORY
from tests.stages.make import BACKBONE
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

WAITING = '''
from dataclasses import dataclass
from pathlib import Path
import time
from lrag_ray.context.base import Base
from waiting_helper import PAUSE_S


@dataclass(frozen=True)
class Settings(Base.Settings):
    gate: str = ""


class Waiting(Base):
    """Pauses before every block until a file is there."""

    Settings = Settings

    def begin_block(self, *args, **kwargs):
        if self.settings.gate and not Path(self.settings.gate).exists():
            time.sleep(PAUSE_S)
        return super().begin_block(*args, **kwargs)
'''


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    started = RayHead()
    try:
        started.start()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="module")
def client(head: RayHead) -> JobClient:
    return JobClient(Dashboard(head.url, "test"), find_token()).check()


class Command:
    """One ``lrag-ray`` in a process of its own, in a folder of its own."""

    def __init__(self, head: RayHead, folder: Path, *arguments: str, **environment: str) -> None:
        self._out = folder / f"{time.monotonic_ns()}.out"
        self._err = self._out.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lrag_ray", *arguments],
                cwd=folder, env={**head.environment, **environment}, stdout=out, stderr=err,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout_s: float = 600) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"it did not end: {self.out}{self.err}")

    def until(self, text: str, timeout_s: float = 400) -> None:
        wait_until(lambda: text in self.err + self.out or self.process.poll() is not None, timeout_s, said=self._said)
        assert text in self.err + self.out, f"it ended with {self.process.returncode} without {text!r}: {self._said()}"

    def _said(self) -> str:
        return self.out + self.err


def submit_program(client: JobClient, name: str, program: str) -> RayJob:
    """A job that is not ours: ``python -c program``."""
    client.submit(name, f"exec python -c {shlex.quote(program)}", {}, {})
    return client.job(name)


def lines_of(client: JobClient, job_id: str) -> list[str]:
    return [line for line in JobLog(client, job_id).lines() if isinstance(line, str)]


def write_run(folder: Path, **changes: Any) -> str:
    """A run of one rollout, with prompts that a .gitignore names and a plug-in beside them; all paths relative."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "waiting_method.py").write_text(WAITING, encoding="utf-8")
    (folder / "waiting_helper.py").write_text("PAUSE_S = 3.0\n", encoding="utf-8")
    (folder / "weights").mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("weights/\n", encoding="utf-8")
    (folder / "weights" / "prompts.txt").write_text("a red fox\n", encoding="utf-8")
    config = {
        "run": {"uri": "runs/here"},
        "prompts": {"path": "weights/prompts.txt"},
        "durations_s": [1.5, 60],
        "backbones": {"tiny": BACKBONE},
        "methods": {"mine": {"method": "waiting_method:Waiting", "window": 9}},
        "engine": {"actors": 1, "checkpoint_every_blocks": 8, "lease_ttl_s": 12},
        "video": {"enabled": False},
        "scoring": {"suite": "none"},
        **changes,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return "run.yaml"


def gated(folder: Path) -> dict[str, Any]:
    method = {"method": "waiting_method:Waiting", "window": 9, "gate": str(folder / "open")}
    return {"methods": {"mine": method}}


def test_a_log_with_an_overlong_line_is_followed_to_its_end(client: JobClient) -> None:
    program = "import time\nprint('first')\nprint('x' * 6_000_000)\ntime.sleep(3)\nprint('last', end='')"
    submit_program(client, "long-line", program)
    lines = lines_of(client, "long-line")
    assert [line for line in lines if line in ("first", "last")] == ["first", "last"]
    assert [len(line) for line in lines if line.startswith("xx")] == [6_000_000]
    assert client.job("long-line").exit_code == 0


def test_a_log_that_cannot_be_read_does_not_end_the_following(client: JobClient) -> None:
    program = (
        "import sys, time\nsys.stdout.buffer.write(b'\\xff\\xfe\\n')\nsys.stdout.flush()\ntime.sleep(2)\nsys.exit(2)"
    )
    submit_program(client, "not-text", program)
    warnings: list[str] = []
    log = JobLog(client, "not-text", warn=warnings.append)
    list(log.lines())
    assert log.job is not None and log.job.exit_code == 2
    assert len(warnings) == 1 and "cannot read the log" in warnings[0]


def test_a_log_whose_connections_are_cut_comes_whole_and_once(head: RayHead, client: JobClient) -> None:
    program = "import time\nfor n in range(40):\n    print('line', n, flush=True)\n    time.sleep(0.2)"
    submit_program(client, "cut", program)
    proxy = CuttingProxy(int(head.url.rsplit(":", 1)[1]))
    outages: list[float] = []

    def note_outage(seconds: float, error: str) -> bool:
        outages.append(seconds)
        if len(outages) > 1:
            proxy.cut()
        return False

    log = JobLog(JobClient(Dashboard(proxy.url, "test"), find_token()), "cut", on_outage=note_outage)
    lines = []
    for line in log.lines():
        if isinstance(line, str) and line.startswith("line"):
            lines.append(line)
            if len(lines) in (10, 25):
                proxy.cut(refuse=len(lines) == 25)
    proxy.close()
    assert lines == [f"line {n}" for n in range(40)]
    assert outages[0] == 0.0 and len(outages) > 1, "it waited while nothing answered"


def test_exit_codes_and_reasons(client: JobClient) -> None:
    submit_program(client, "code-7", "raise SystemExit(7)")
    killed = submit_program(client, "killed", "import os\nprint(os.getpid(), flush=True)\nimport time\ntime.sleep(600)")
    client.submit("no-python", "exec no-such-program", {}, {})
    client.submit("no-env", "true", {"py_modules": ["gcs://absent.zip"]}, {})
    client.submit("no-module", "exec python -m lrag_ray_of_another_image", {}, {})
    wait_until(lambda: re.search(r"^\d+$", client.log(killed.id), re.MULTILINE) is not None)
    found = re.search(r"^\d+$", client.log(killed.id), re.MULTILINE)
    assert found is not None
    # What the kernel does when the head node has no memory left.
    os.kill(int(found[0]), signal.SIGKILL)
    ends = {
        name: follow(submitted(client, client.job(name)))
        for name in ("code-7", "killed", "no-python", "no-env", "no-module")
    }
    assert {name: end.exit_code for name, end in ends.items()} == {
        "code-7": 7, "killed": 137, "no-python": 127, "no-env": 3, "no-module": 1,
    }  # fmt: skip
    assert "out-of-memory" in ends["killed"].reason and "--python" in ends["no-python"].reason
    assert "absent.zip" in ends["no-env"].reason
    assert "no module lrag_ray_of_another_image" in ends["no-module"].reason


def test_a_job_is_stopped_at_once_and_twice(client: JobClient) -> None:
    job = submitted(client, submit_program(client, "stopped", "import time\ntime.sleep(600)"))
    assert (stop(job).state, stop(job).exit_code) == ("STOPPED", 130)


def test_a_run_is_submitted_with_its_code_and_done(head: RayHead, tmp_path: Path) -> None:
    config = write_run(tmp_path, durations_s=[1.5])
    done = Command(head, tmp_path, "submit", config, "--address", "http://elsewhere:8265", RAY_ADDRESS=head.url)
    assert done.wait() == 0, done.err
    assert f"RAY_ADDRESS is set to {head.url}, which overrides --address http://elsewhere:8265" in done.err
    assert "py_modules_files" in done.err, "the code that travelled runs, not that of the nodes"
    assert "made 1 of 1 results" in done.out and "succeeded, exit code 0" in done.out
    assert [commit.latent_frames for commit in RolloutRun(str(tmp_path / "runs" / "here")).commits()] == [6]


@pytest.mark.proof
def test_a_run_from_another_folder_is_detached_attached_stopped_and_continued(
    head: RayHead, client: JobClient, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    config = write_run(folder, **gated(tmp_path))
    run = RolloutRun(str(folder / "runs" / "here"))
    at = ["--address", head.url]

    wrong = Command(head, folder, "submit", config, *at, RAY_AUTH_TOKEN="wrong" * 8)
    assert wrong.wait() == 3 and "refuses the token in RAY_AUTH_TOKEN" in wrong.err
    wrong = Command(head, folder, "jobs", RAY_AUTH_TOKEN="wrong" * 8, RAY_ADDRESS=f"127.0.0.1:{head.gcs}")
    assert wrong.wait() == 3 and "refuses the token in RAY_AUTH_TOKEN" in wrong.err
    elsewhere = Command(
        head, tmp_path, "submit", f"project/{config}", *at, PYTHONPATH=f"{REPOSITORY}{os.pathsep}{folder}"
    )
    assert elsewhere.wait() == 2 and "is not in the working directory but beside" in elsewhere.err

    first = Command(head, folder, "submit", config, *at)
    second = Command(head, folder, "submit", config, *at, "--no-follow", "--json")
    assert second.wait() == 0
    first.until("rollouts 0/1")
    shown = json.loads(second.out)
    jobs = [job for job in client.jobs() if job.metadata.get("lrag_run") == str(folder / "runs" / "here")]
    assert [job.id for job in jobs] == [shown["id"]], "of two at once, one starts the job and the other attaches"
    assert len(shown["commands"]) == 5
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == 130
    assert f"detached: {shown['id']} goes on" in first.err and "lrag-ray stop" in first.err
    assert not client.job(shown["id"]).ended

    attached = Command(head, folder, "submit", config, *at, "--set", "prompts.samples=2")
    attached.until("attached to it")
    # In the middle: the first horizon is there, and the next part would be stored at the end only.
    wait_until(lambda: len(run.commits()) == 1)
    assert "another version of the configuration" in attached.err
    stopping = Command(head, folder, "stop", "runs/here", *at)
    assert stopping.wait() == 0 and "was stopped" in stopping.out
    assert attached.wait() == 130 and "stopped, exit code 130" in attached.out
    assert len(run.commits()) == 1 and open_parts(run), "what was finished is stored before the job ends"

    (tmp_path / "open").touch()
    resumed = Command(head, folder, "submit", config, *at, RAY_ADDRESS=head.url)
    assert resumed.wait() == 0, resumed.err
    assert "attached" not in resumed.out and "made 1 of 2 results" in resumed.out
    assert {commit.latent_frames for commit in run.commits()} == {6, 240}
    listed = Command(head, folder, "jobs", "--json", RAY_ADDRESS=f"127.0.0.1:{head.gcs}")
    assert listed.wait() == 0, listed.err
    states = [job["state"] for job in json.loads(listed.out)["jobs"] if job["run"] == str(folder / "runs" / "here")]
    assert states == ["STOPPED", "SUCCEEDED"]
    logs = Command(head, folder, "logs", "runs/here", *at)
    assert logs.wait() == 0 and "2 results" in logs.out
    unknown = Command(head, folder, "logs", "runs/else", *at)
    assert unknown.wait() == 2 and "has no job 'runs/else'" in unknown.err


def test_the_image_of_another_version_is_refused(head: RayHead, tmp_path: Path) -> None:
    """With --no-upload the nodes' own code runs."""
    config = write_run(tmp_path)
    program = "import lrag_ray; lrag_ray.__version__ = '9.9'; from lrag_ray.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "submit", config, "--address", head.url, "--no-upload"],
        cwd=tmp_path, env=dict(head.environment), capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "lrag-ray 9.9" in done.stderr and "the nodes have" in done.stderr


@pytest.mark.proof
def test_a_head_that_restarts_forgets_the_job_and_the_next_submit_continues(
    head: RayHead, client: JobClient, tmp_path: Path
) -> None:
    config = write_run(tmp_path, **gated(tmp_path))
    at = ["--address", head.url]
    following = Command(head, tmp_path, "submit", config, *at)
    following.until("rollouts 0/1")
    head.kill()
    following.until("Looking again until it answers")
    following.until("of 2 results are there")
    head.start()
    assert following.wait() == 3
    assert "no longer knows" in following.err and "same submit continues" in following.err
    with pytest.raises(UnknownJobError):
        client.job("code-7")
    (tmp_path / "open").touch()
    again = Command(head, tmp_path, "submit", config, *at)
    assert again.wait() == 0, again.err
    assert re.search(r"made [12] of 2 results", again.out)

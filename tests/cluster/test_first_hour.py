"""docs/first-hour.md, followed to the letter from a clean clone: every command of the page, and what it promises."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.drivers import REPOSITORY, actors_below

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(3600)]

PAGE = Path("docs/first-hour.md")
RUN = "runs/first-hour"


class Reader:
    """Does what the page says: its commands, in order, in one shell's environment."""

    def __init__(self, clone: Path) -> None:
        self.clone = clone
        sections = re.split(r"^## (?=\d+\. )", (clone / PAGE).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        self._steps = {
            section.partition("\n")[0]: [
                line
                for block in re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
                for line in block.splitlines()
            ]
            for section in sections
        }
        self._sourced = ":"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LRAG_"))}
        # What `source .venv/bin/activate` does, with the environment of this test.
        program = Path(sys.executable).parent
        self._environment = environment | {"PATH": f"{program}:{environment['PATH']}", "PYTHONPATH": str(clone)}

    @property
    def left(self) -> list[str]:
        """Steps that were not followed."""
        return list(self._steps)

    def step(self, title: str, until: Mapping[str, str] | None = None) -> list[str]:
        """Do a step; what each of its commands printed.

        A command that contains a key of `until` gets Ctrl-C once it has printed the text.
        """
        return [self._command(line, dict(until or {})) for line in self._steps.pop(title)]

    def again(self, line: str) -> str:
        """What a command prints that the page has and a reader repeats."""
        return self._command(line, {})

    def _command(self, line: str, until: dict[str, str]) -> str:
        if line.startswith("source "):
            self._sourced = line
        waits = next((text for key, text in until.items() if key in line), None)
        log = self.clone.parent / f"{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            # `exec`, so that the signal reaches the program as from a terminal.
            shell = f"{self._sourced}; {line if line.startswith('source ') else f'exec {line}'}"
            started = subprocess.Popen(
                ["bash", "-c", shell],
                cwd=self.clone, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        if waits is not None:
            until_true(lambda: waits in log.read_text(errors="replace") or started.poll() is not None, line)
            started.send_signal(signal.SIGINT)
        code = started.wait(2400)
        text = log.read_text(encoding="utf-8", errors="replace")
        print(f"$ {line}\n{text}[exit code {code}]\n", flush=True)
        assert code == (0 if waits is None else 130), f"{line}: {code}\n{text}"
        return text


def until_true(condition: Callable[[], bool], what: str, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: it did not happen in {timeout_s} s"
        time.sleep(0.5)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", f"file://{REPOSITORY}", str(clone)], check=True)
    reader = Reader(clone)
    try:
        yield reader
    finally:
        if (clone / "runs" / "simulated" / "state.json").is_file():
            reader.again("python scripts/simulated_nodes.py down")


def test_the_first_hour_goes_as_the_page_says(reader: Reader) -> None:
    run = RolloutRun(str(reader.clone / RUN))

    def workers() -> int:
        nodes = json.loads((reader.clone / "runs" / "simulated" / "state.json").read_text(encoding="utf-8"))["nodes"]
        return sum(bool(actors_below(pid)) for pid in nodes.values())

    reader.step("1. A cluster")
    (rows,) = reader.step("2. Doctor")
    for check in ("packages", "ray", "video codec", "prompts", "storage", "disk", "host memory"):
        assert f"ok    {check}  " in rows
    *checks, total = [line for line in rows.splitlines() if line[:1].strip()]
    assert {line.split()[0] for line in checks} == {"ok"}, rows
    assert total == f"{len(checks)} checks: {len(checks)} ok."
    (plan,) = reader.step("3. Plan")
    assert re.search(r"^total +36 ", plan, re.MULTILINE)
    cells = re.findall(r"^tiny .* (\d+) s +(\d+) +[\d,]+ +(\d+)$", plan, re.MULTILINE)
    assert {(seconds, frames) for seconds, frames, _ in cells} == {("9", "36"), ("30", "120")}
    assert sum(int(videos) for _, _, videos in cells) == 72

    submitted, jobs, followed = reader.step("4. Submit", {" submit ": "rollouts 0/36", "--follow": "rollouts "})
    assert "travels with the job: the configuration, this code, configs/prompts/demo.txt" in submitted
    (job,) = re.findall(r"^submitted (\S+)$", submitted, re.MULTILINE)
    assert f"detached: {job} goes on" in submitted and f"detached: {job} goes on" in followed
    assert f"{job}  running" in jobs
    (status,) = reader.step("5. Watch")
    assert "rag" in status and "no failures" not in status

    until_true(lambda: workers() == 6, "six workers")
    lost, status = reader.step("6. Lose a node")
    assert "node 3 is gone" in lost
    logs = f"lrag-ray logs {RUN} --address $LRAG_JOBS"
    until_true(lambda: "was lost and is replaced" in reader.again(logs), "the log says so", 60)
    failures = (reader.clone / RUN / "failures").rglob("*.json")
    assert not any(json.loads(path.read_text(encoding="utf-8"))["counted"] for path in failures)
    reader.step("7. Add two")
    until_true(lambda: workers() == 7, "seven workers")

    reader.step("8. Stop")
    assert "stopped" in reader.again("lrag-ray jobs --address $LRAG_JOBS")
    commits = len(run.commits())
    (resumed,) = reader.step("9. Resume")
    assert f"made {72 - commits} of 72 results" in resumed and "succeeded, exit code 0" in resumed
    assert "Average ranks (lower is better)" in resumed
    report, _ = reader.step("10. Report")
    assert "Average rank" in report
    summary = reader.clone / RUN / "summary"
    assert {"report.html", "ranks.csv", "differences.csv", "table.tex"} <= {path.name for path in summary.iterdir()}
    assert reader.left == [], "steps of the page that this test does not follow"

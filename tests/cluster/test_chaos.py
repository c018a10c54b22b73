"""Workers, nodes and drivers are killed at random until a run is done; it must equal one that nothing disturbed.

Kills come as soon as their victim has done something, never by the clock, in an order drawn from a seed. The long form
(RUN_NIGHTLY=1) decodes videos as well and kills a hundred times.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import pytest

from lrag_ray.store.gc import find_leftovers, remove_leftovers
from lrag_ray.store.lease import holder
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.cluster.drivers import Driver, driver, write_config
from tests.cluster.nodes import Nodes, actors_on, is_at_work, nodes
from tests.cluster.quiet import ALL_METHODS, assert_equal, attempts, by_horizon, make_config, quiet_run

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(1200)]

Victim = Literal["worker", "node", "driver"]

DONE_SOMETHING = 2
"""Files of progress (parts, commits) between the moment that a victim is seen at work and its death."""


@dataclass(frozen=True)
class Scene:
    """A run and what happens to it."""

    prompts: int
    """To begin with; a run that is done before all was seen that is to be seen grows by as many again."""
    kills: dict[Victim, int]
    """At least; workers more often where no rollout had to be continued by another one."""
    video: bool
    seed: int


SHORT = Scene(8, {"worker": 13, "node": 5, "driver": 4}, video=False, seed=20261121)
FILMED = Scene(3, {"worker": 2, "node": 1, "driver": 1}, video=True, seed=5)
LONG = Scene(40, {"worker": 60, "node": 25, "driver": 15}, video=True, seed=7)


@dataclass
class Monkey:
    """Kills whatever is next on its list once that has done something, and restarts the driver until it is done."""

    cluster: Nodes
    folder: Path
    scene: Scene
    prompts: int = 0
    killed: Counter[Victim] = field(default_factory=Counter)
    exit_codes: list[int] = field(default_factory=list)
    _seen: dict[int, int] = field(default_factory=dict)
    """Progress at the moment that a process was first seen at work."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.scene.seed)
        self._grow()
        self._list = [victim for victim, count in sorted(self.scene.kills.items()) for _ in range(count)]
        self._random.shuffle(self._list)

    def rampage(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with driver(self._file) as current:
                while current.process.poll() is None:
                    if time.monotonic() > deadline:
                        pytest.fail(f"not done in {timeout_s} s; killed {self.killed}: {current.text}")
                    if self._list and self._kill(self._list[0], current):
                        self.killed[self._list.pop(0)] += 1
                    time.sleep(0.05)
            self.exit_codes.append(current.process.returncode)
            # 1: a rollout was given up, which the next start tries again.
            assert current.process.returncode in (0, 1, -9), current.text
            if current.process.returncode == 0:
                if not self._list:
                    if any(len(attempts(commit)) > 1 for commit in self.run.commits()):
                        return
                    self._list.append("worker")
                self._grow()

    def _grow(self) -> None:
        self.prompts += self.scene.prompts
        config = make_config(self.folder, self.cluster.address, self.prompts, video={"enabled": self.scene.video})
        self.run = RolloutRun(config.run.uri)
        self._file = write_config(self.folder / "config.yaml", config)

    def _kill(self, victim: Victim, current: Driver) -> bool:
        progress = sum(
            bool(re.search(r"/(part|commit)-[\d-]+\.json$", path)) for path in self.run.storage.list_files("rollouts")
        )
        at_work = {actor.pid: node for node in self.cluster.alive for actor in actors_on(node) if is_at_work(actor)}
        for pid in at_work:
            self._seen.setdefault(pid, progress)
        if at_work:
            self._seen.setdefault(current.process.pid, progress)
        ripe = [pid for pid in at_work if progress - self._seen[pid] >= DONE_SOMETHING]
        if victim == "driver":
            if progress - self._seen.get(current.process.pid, progress) < DONE_SOMETHING:
                return False
            current.process.kill()
            current.process.wait()
        elif not ripe:
            return False
        elif victim == "worker":
            try:
                psutil.Process(self._random.choice(ripe)).kill()
            except psutil.NoSuchProcess:
                # Its rollouts were done, or its driver is dead.
                return False
        else:
            self.cluster.kill(at_work[self._random.choice(ripe)])
            self.cluster.add()
        return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with nodes() as started:
        for _ in range(2):
            started.add()
        yield started


def survive(cluster: Nodes, folder: Path, scene: Scene, timeout_s: float) -> Monkey:
    """Run a scene with kills and quietly, and compare."""
    monkey = Monkey(cluster, folder / "chaos", scene)
    monkey.rampage(timeout_s)
    assert all(monkey.killed[victim] >= count for victim, count in scene.kills.items())
    found = monkey.run
    quiet = quiet_run(make_config(folder / "quiet", None, monkey.prompts, video={"enabled": scene.video}))

    status = run_status(found)
    assert status.done and status.problems == [] and status.failures == []
    commits = by_horizon(found)
    assert len(commits) == monkey.prompts * len(ALL_METHODS) * 2
    assert_equal(found, quiet)
    assert any(len(attempts(commit)) > 1 for commit in commits.values()), "no rollout was continued by another attempt"
    last = holder(found.storage)
    assert last is not None and last.is_free
    assert_only_what_counts_is_left(found)
    return monkey


def assert_only_what_counts_is_left(run: RolloutRun) -> None:
    """`gc` removes all that died attempts left, and nothing that a commit names."""
    remove_leftovers(run, find_leftovers(run, older_than_s=0, unfinished=False).found)
    counted = set()
    for (folder, frames), commit in by_horizon(run).items():
        counted.add(f"{folder}/commit-{frames}.json")
        for part, trace in zip(commit.latent_parts, commit.trace_parts, strict=True):
            counted |= {part.path, trace.path, part.path.replace(".safetensors", ".json")}
        counted |= {commit.video.path} if commit.video is not None else set()
    # With unfinished writes, which `Storage.list_files` does not show.
    assert {path for path in run.storage.list_details() if path.startswith("rollouts/")} == counted


def test_a_run_survives_what_is_killed_at_random_and_equals_a_quiet_one(cluster: Nodes, tmp_path: Path) -> None:
    monkey = survive(cluster, tmp_path, SHORT, timeout_s=900)
    assert monkey.killed.total() >= 20
    assert monkey.prompts * len(ALL_METHODS) >= 24


def test_videos_survive_as_well(cluster: Nodes, tmp_path: Path) -> None:
    survive(cluster, tmp_path, FILMED, timeout_s=600)


@pytest.mark.nightly
@pytest.mark.skipif(not os.environ.get("RUN_NIGHTLY"), reason="takes half an hour (set RUN_NIGHTLY=1)")
@pytest.mark.timeout(7200)
def test_a_long_run_survives_a_hundred_kills(cluster: Nodes, tmp_path: Path) -> None:
    survive(cluster, tmp_path, LONG, timeout_s=5400)

"""Two real drivers on one run: one works; the other is told who does, or takes over what is dead."""

from __future__ import annotations

import os
import platform
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.progress import Notice, RunPlanned
from lrag_ray.engine.run import run
from lrag_ray.errors import LeaseError
from lrag_ray.store.lease import holder
from lrag_ray.store.run_dir import RunDirectory
from tests.cluster.drivers import actors_below, driver, write_config
from tests.cluster.nodes import stop_at_work
from tests.cluster.test_run import NO_VIDEO, Recorder, wait_until
from tests.engine import make
from tests.engine.make import digests

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

PROMPTS = ["a red fox in the snow", "a river at dawn", "two dancers", "a lighthouse"]
TTL_S = 10.0


def make_config(folder: Path, uri: Path) -> RunConfig:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return make.make_config(
        uri,
        prompts={"path": str(folder / "prompts.txt")},
        durations_s=[30],
        video=NO_VIDEO,
        engine={"actors": 1, "checkpoint_every_blocks": 2, "lease_ttl_s": TTL_S},
    )


@pytest.fixture(scope="module")
def quiet(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("quiet")
    assert run(make_config(folder, folder / "run")).exit_code == 0
    return RunDirectory(str(folder / "run"))


def test_the_second_driver_is_refused_while_the_first_lives_and_takes_over_when_it_is_killed(
    quiet: RunDirectory, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tmp_path / "run")
    directory = RunDirectory(str(tmp_path / "run"))
    with driver(write_config(tmp_path / "config.yaml", config)) as first:
        # Its actor is put to sleep, so that something is left to take over however quick it is.
        actor = stop_at_work(
            first.wait_until, lambda: actors_below(first.process.pid), lambda: len(directory.commits()) >= 1
        )
        progress = Recorder()
        with pytest.raises(LeaseError) as refused:
            run(config, progress=progress)
        assert f"on {platform.node()} (lrag-ray run, process {first.process.pid}) since " in str(refused.value)
        assert LeaseError.exit_code == 3
        assert progress.of(RunPlanned) == [], "it went past the lease"

        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        with suppress(psutil.NoSuchProcess):
            actor.kill()
        assert len(directory.commits()) < len(quiet.commits()), "nothing was left to take over"
        progress = Recorder()
        outcome = run(config, progress=progress)
    assert outcome.exit_code == 0
    assert not [notice for notice in progress.of(Notice) if "Waiting for a sign of life" in notice.text]
    assert digests(directory.commits()) == digests(quiet.commits())
    found = holder(directory.storage)
    assert found is not None and found.is_free


def test_a_driver_that_was_asleep_past_its_lease_stops_when_it_wakes_up(quiet: RunDirectory, tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "run")
    directory = RunDirectory(str(tmp_path / "run"))
    with driver(write_config(tmp_path / "config.yaml", config)) as first:
        first.wait_until(lambda: len(directory.commits()) >= 1)
        os.kill(first.process.pid, signal.SIGSTOP)
        actors = actors_below(first.process.pid)
        assert len(actors) == 1
        assert len(directory.commits()) < len(quiet.commits()), "nothing was left to take over"

        progress = Recorder()
        outcome = run(config, progress=progress)
        assert outcome.exit_code == 0
        told = [notice.text for notice in progress.of(Notice)]
        assert any(f"process {first.process.pid}" in text and "Waiting for a sign of life" in text for text in told)
        assert any(text.endswith("this driver takes over") for text in told)

        os.kill(first.process.pid, signal.SIGCONT)
        assert first.wait() == 3
        assert f"was taken over by {holder(directory.storage)}" in first.text
        wait_until(lambda: not any(actor.is_running() and actor.status() != psutil.STATUS_ZOMBIE for actor in actors))
    assert digests(directory.commits()) == digests(quiet.commits())

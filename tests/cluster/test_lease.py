"""Two real drivers on one run: one works; the other is reported who does, or takes over what is dead."""

from __future__ import annotations

import platform
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lrag_ray.errors import LeaseError
from lrag_ray.events import Notice, RunPlanned
from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.store.lease import holder
from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.drivers import actors_below, driver, write_config
from tests.cluster.nodes import wait_for_end
from tests.cluster.quiet import Gate, assert_equal, make_config, open_parts, quiet_run
from tests.cluster.test_run import Recorder
from tests.stages.make import METHODS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

SMALL: dict[str, Any] = {"engine": {"actors": 1, "lease_ttl_s": 10.0}, "methods": {"base": METHODS["base"]}}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    folder = tmp_path_factory.mktemp("quiet")
    return quiet_run(make_config(folder / "run", None, 1, [Gate(folder / "open", opened=True)], **SMALL))


def test_the_second_driver_is_refused_while_the_first_lives_and_takes_over_when_it_is_killed(
    quiet: RolloutRun, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate", behind_commit=True)
    config = make_config(tmp_path / "run", None, 1, [gate], **SMALL)
    directory = RolloutRun(config.run.uri)
    with driver(write_config(tmp_path / "config.yaml", config)) as first:
        first.wait_until(lambda: bool(directory.commits()))
        actors = actors_below(first.process.pid)
        recorder = Recorder()
        with pytest.raises(LeaseError) as refused:
            evaluate(config, listener=recorder)
        assert f"on {platform.node()} (lrag-ray run, process {first.process.pid}) since " in str(refused.value)
        assert LeaseError.exit_code == 3
        assert recorder.of(RunPlanned) == [], "it went past the lease"

        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        for actor in actors:
            with suppress(psutil.NoSuchProcess):
                actor.kill()
        assert len(directory.commits()) < len(quiet.commits()), "nothing was left to take over"
        gate.open()
        recorder = Recorder()
        outcome = evaluate(config, listener=recorder)
    assert outcome.exit_code == 0
    assert not [notice for notice in recorder.of(Notice) if "Waiting for a sign of life" in notice.text]
    assert_equal(directory, quiet)
    found = holder(directory.storage)
    assert found is not None and found.is_free


@pytest.mark.proof
def test_a_driver_that_was_asleep_past_its_lease_stops_when_it_wakes_up(quiet: RolloutRun, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    config = make_config(tmp_path / "run", None, 1, [gate], **SMALL)
    directory = RolloutRun(config.run.uri)
    with driver(write_config(tmp_path / "config.yaml", config)) as first:
        first.wait_until(lambda: bool(open_parts(directory)))
        (actor,) = actors_below(first.process.pid)
        first.process.send_signal(signal.SIGSTOP)
        # Asleep as well: when the driver wakes up, it is still in the middle of its first rollout.
        actor.suspend()
        gate.open()

        recorder = Recorder()
        outcome = evaluate(config, listener=recorder)
        assert outcome.exit_code == 0
        told = [notice.text for notice in recorder.of(Notice)]
        assert any(f"process {first.process.pid}" in text and "Waiting for a sign of life" in text for text in told)
        assert any(text.endswith("this driver takes over") for text in told)

        first.process.send_signal(signal.SIGCONT)
        assert first.wait() == 3
        assert f"was taken over by {holder(directory.storage)}" in first.text
        # A process that is stopped cannot notice that its driver is gone.
        with suppress(psutil.NoSuchProcess):
            actor.resume()
        wait_for_end([actor])
    assert_equal(directory, quiet)

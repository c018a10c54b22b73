"""Nodes join and die while a run continues: the speed changes, the results do not, and little is done twice.

The first rollout waits at a gate until a test has done what it does to it, so that nothing depends on speed.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.drivers import driver, write_config
from tests.cluster.nodes import actors_on, is_alive, nodes
from tests.cluster.quiet import (
    Gate,
    assert_equal,
    attempts,
    by_horizon,
    make_config,
    open_parts,
    part_records,
    quiet_run,
)

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    return quiet_run(make_config(folder, prompts=2, gates=[Gate(folder / "open", opened=True)]))


def test_a_node_that_joins_is_used_and_one_that_dies_costs_its_blocks_since_the_last_part(
    quiet: RolloutRun, tmp_path: Path
) -> None:
    with nodes() as cluster:
        first, gate = cluster.add(), Gate(tmp_path / "gate")
        engine = {"actors": {"min": 1, "max": 3}}
        config = make_config(tmp_path / "elastic", cluster.address, prompts=2, gates=[gate], engine=engine)
        run = RolloutRun(config.run.uri)
        with driver(write_config(tmp_path / "config.yaml", config)) as started:
            started.wait_until(lambda: bool(open_parts(run)))
            assert len(actors_on(first)) == 1 and run.commits() == []
            second = cluster.add()
            # The only actor that the first has room for waits in the middle of a rollout.
            started.wait_until(lambda: bool(run.commits()))
            assert len(actors_on(second)) == 1, "the results came from elsewhere"

            cluster.kill(first)
            gate.open()
            assert started.wait() == 0, started.text
    assert_equal(run, quiet)
    continued = [commit for commit in by_horizon(run).values() if len(attempts(commit)) > 1]
    assert continued, "the rollout of the dead node was begun again"
    # A part is stored once its record is: the actor may have been killed between the two.
    parts = Counter(re.sub(r"/attempt-[^/]+/", "/", path) for path in part_records(run))
    assert max(parts.values()) == 1, "a stored part was made again"


def test_a_dead_head_takes_the_cluster_along_and_a_new_one_continues(
    quiet: RolloutRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray ends what cannot reach its head for that long; a minute by default.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    with nodes() as cluster:
        first, gate = cluster.add(), Gate(tmp_path / "gate")
        config = make_config(tmp_path / "run", cluster.address, prompts=2, gates=[gate])
        run = RolloutRun(config.run.uri)
        with driver(write_config(tmp_path / "config.yaml", config)) as started:
            started.wait_until(lambda: bool(open_parts(run)))
            (actor,) = actors_on(first)
            stored = run.storage.list_files("rollouts")
            cluster.kill_head()
            assert started.wait() != 0
            assert not is_alive(actor)
        assert stored.items() <= run.storage.list_files("rollouts").items()
        assert len(run.commits()) < len(quiet.commits())

        gate.open()
        cluster.start_head()
        cluster.add()
        config = make_config(tmp_path / "run", cluster.address, prompts=2, gates=[gate])
        with driver(write_config(tmp_path / "config.yaml", config)) as again:
            assert again.wait() == 0, again.text
        assert "Waiting for a sign of life" not in again.text
    assert_equal(run, quiet)

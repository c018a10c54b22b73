from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

import lrag_ray.cli.app as cli
from lrag_ray.store.rollouts import RolloutRun
from tests.store.make import make_identity, rollout_id, store_commit


def test_leftovers_are_shown_then_removed(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity())
    for horizon in (6, 12):
        store_commit(run, identity, rollout_id(), horizon)
    leftover = f"{rollout_id().path}/attempt-died/video-6.mp4"
    run.storage.write(leftover, b"x" * 1500)
    call = ["gc", run.uri, "--older-than", "0"]
    invoke = CliRunner().invoke
    shown = invoke(cli.app, call).stdout
    assert "unnamed video" in shown and "1.5 kB" in shown and leftover in shown and "--remove deletes them" in shown
    told = json.loads(invoke(cli.app, [*call, "--json"]).stdout)
    assert [(one["path"], one["size_bytes"]) for one in told["leftovers"]] == [(leftover, 1500)]
    assert "nothing to remove" in invoke(cli.app, ["gc", run.uri, "--remove"]).stdout
    assert leftover in run.storage.list_files()
    done = invoke(cli.app, [*call, "--remove"])
    assert done.exit_code == 0 and "removed: 1 file, 1.5 kB" in done.stdout
    assert leftover not in run.storage.list_files() and len(run.commits()) == 2

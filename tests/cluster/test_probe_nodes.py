"""A cluster whose nodes do not see the same folder: one of them has a disk of its own mounted there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lrag_ray.engine.probe_nodes import CLOCK_SKEW_S, probe_node, report_skew
from lrag_ray.errors import StorageError
from lrag_ray.events import Event, Notice
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.shared import require_run
from tests.store.make import make_identity
from tests.store.namespaces import unshare_command

DRIVER = """
import sys, tempfile
import ray
from lrag_ray.engine.probe_nodes import probe_nodes
from lrag_ray.errors import StorageError
from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.nodes import ray_start
from tests.stages.make import make_config
from tests.store.make import make_identity

runs = [RolloutRun(f"{sys.argv[1]}/{name}") for name in ("shared", "private")]
for run in runs:
    run.ensure(make_identity())
mount = ["sh", "-c", f'mount -t tmpfs none {runs[1].uri} && exec "$@"', "sh"]
before = [*sys.argv[2:], *mount] if sys.argv[2:] else []

with tempfile.TemporaryDirectory(prefix="lr", ignore_cleanup_errors=True) as temporary:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             _temp_dir=temporary, _node_ip_address="127.0.0.1")
    notices = []
    probe_nodes(runs[1], make_config(runs[1].uri), notices.append)
    address = ray.get_runtime_context().gcs_address
    with ray_start(f"--address={address}", "--num-cpus=1", "--node-ip-address=127.0.0.1", prefix=before):
        probe_nodes(runs[0], make_config(runs[0].uri), notices.append)
        print("shared", notices)
        try:
            probe_nodes(runs[1], make_config(runs[1].uri), notices.append)
        except StorageError as error:
            print("refused:", error)
    print("left", [sorted(run.storage.list_files()) for run in runs])
    ray.shutdown()
"""


@pytest.mark.cluster
def test_a_folder_that_a_node_does_not_share_is_refused_and_one_that_is_shared_is_not(tmp_path: Path) -> None:
    unshare = unshare_command()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), *(unshare or ())],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "shared []" in done.stdout
    assert "left [['run.json'], ['run.json']]" in done.stdout
    if unshare is None:
        pytest.skip("this user may not mount in a namespace of its own: only the shared folder was tried")
    (refused,) = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert str(tmp_path / "private") in refused and refused.count(f"{platform.node()} (") == 1
    assert "all nodes mount under the same path" in refused and "run.uri=s3://" in refused


def test_a_node_with_an_empty_folder_or_another_run_writes_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the task does on a node, for a node whose folder is another one."""
    monkeypatch.setattr("lrag_ray.store.shared.LOOK_AGAIN_S", 0.01)
    run, elsewhere = RolloutRun(str(tmp_path / "run")), RolloutRun(str(tmp_path / "elsewhere"))
    created_at = run.ensure(make_identity()).created_at
    (tmp_path / "there.pt").touch()
    (tmp_path / "empty").mkdir()
    places = [str(tmp_path / name) for name in ("there.pt", "absent.pt", "empty")]
    report = probe_node(run, created_at, "probe-one", places)
    assert report.create_only and report.wrote == "probe-one" and report.absent == tuple(places[1:])
    assert probe_node(elsewhere, created_at, "probe-two").wrote is None
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(StorageError, match="not the same folder on every node"):
        require_run(elsewhere, created_at)
    elsewhere.ensure(make_identity(created_at="2001-01-01T00:00:00.000+00:00"))
    assert probe_node(elsewhere, created_at, "probe-two").wrote is None
    assert elsewhere.storage.list_files().keys() == {"run.json"}
    require_run(run, created_at)


@pytest.mark.parametrize(("skew_s", "told"), [(7200.0, "7200 s ahead of"), (-40.0, "40 s behind"), (0.5, None)])
def test_a_clock_that_is_off_is_reported(skew_s: float, told: str | None) -> None:
    events: list[Event] = []
    report_skew("gpu-3 (10.0.0.3)", skew_s, events.append)
    texts = [event.text for event in events if isinstance(event, Notice) and event.warning]
    if told is None:
        assert abs(skew_s) < CLOCK_SKEW_S and texts == []
    else:
        assert len(texts) == 1 and "gpu-3" in texts[0] and told in texts[0]

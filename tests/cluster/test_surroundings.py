"""Whole runs where the surroundings are bad: a store that throttles and lags, no shared memory, lost permissions,
two drivers on two hosts, a signal while Ray starts. Each ends like a run that nothing disturbed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml

from lrag_ray.config.schema import RunConfig
from lrag_ray.store.lease import holders
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.cluster.drivers import REPOSITORY, command, write_config
from tests.cluster.nodes import free_port, private_folder, ray_start
from tests.cluster.quiet import Gate, assert_equal, make_config, open_parts, quiet_run
from tests.store.fault_proxy import Fault, FaultProxy, seeded
from tests.store.namespaces import unshare_command
from tests.waiting import wait_until

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(900)]

THROTTLED: tuple[Fault, ...] = ("SlowDown",)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    return quiet_run(make_config(tmp_path_factory.mktemp("quiet") / "run", prompts=1))


def test_a_whole_run_through_a_store_that_throttles_a_fifth_and_lists_late(
    quiet: RolloutRun, s3_bucket: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path / "run", prompts=1, engine={"actors": 1}, scoring={"suite": "preview"}, video={})
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]).running() as proxy:
        fields = config.model_dump(mode="json", exclude_unset=True)
        fields["run"] = {"uri": f"{s3_bucket}/{tmp_path.name}"}
        fields["storage"] = {"endpoint_url": proxy.endpoint, "attempts": 12}
        file = write_config(tmp_path / "config.yaml", RunConfig.model_validate(fields))
        proxy.choose, proxy.lag_s = seeded(0.2, seed=3, faults=THROTTLED), 5.0
        with command(tmp_path / "log", "run", str(file)) as first:
            assert first.wait() == 0, first.text
        assert proxy.injected["SlowDown"] > 50 and proxy.hidden > 50
        # At once: what the first has made last is not listed yet.
        with command(tmp_path / "log2", "run", str(file)) as again:
            assert again.wait() == 0, again.text
    found = RolloutRun(f"{s3_bucket}/{tmp_path.name}")
    status = run_status(found)
    assert status.done and status.problems == [] and status.failures == [], first.text
    assert {c.latents_digest for c in found.commits()} == {c.latents_digest for c in quiet.commits()}
    assert not [path for path in found.storage.list_files() if ".invalid-" in path], "something was set aside"
    page = found.storage.read_bytes("summary/report.html").decode()
    assert "Without scores yet" not in first.text and "Preview measures" in page


def test_a_run_where_shared_memory_is_tiny(quiet: RolloutRun, tmp_path: Path) -> None:
    """8 MB, as containers have it: less than Ray's smallest object store."""
    unshare = unshare_command()
    if unshare is None:
        pytest.skip("this user may not mount in a namespace of its own (unshare --mount)")
    config = make_config(tmp_path / "run", prompts=1, engine={"actors": 1}, scoring={"suite": "preview"})
    shell = 'mount -t tmpfs -o size=8m none /dev/shm && exec "$@"'
    prefix = (*unshare, "sh", "-c", shell, "sh")
    file = write_config(tmp_path / "config.yaml", config)
    with command(tmp_path / "log", "run", str(file), prefix=prefix) as started:
        assert started.wait() == 0, started.text
    assert_equal(RolloutRun(config.run.uri), quiet)


def test_a_run_on_a_cluster_with_the_smallest_object_store(quiet: RolloutRun, tmp_path: Path) -> None:
    port = free_port()
    with private_folder() as folder:
        options = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}"]
        with ray_start(*options, "--object-store-memory=78643200", "--include-dashboard=false"):
            scoring = {"suite": "preview"}
            config = make_config(tmp_path / "run", f"127.0.0.1:{port}", prompts=1, scoring=scoring)
            file = write_config(tmp_path / "config.yaml", config)
            with command(tmp_path / "log", "run", str(file)) as started:
                assert started.wait() == 0, started.text
    assert_equal(RolloutRun(config.run.uri), quiet)


def test_a_run_whose_folder_loses_its_permissions_says_so_and_is_continued(tmp_path: Path) -> None:
    without_override: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("permissions mean something to root only without a capability, which needs setpriv")
        without_override = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    undisturbed = quiet_run(make_config(tmp_path / "quiet", prompts=1, gates=[Gate(tmp_path / "o", opened=True)]))
    gate = Gate(tmp_path / "gate")
    config = make_config(tmp_path / "run", prompts=1, gates=[gate], engine={"actors": 1})
    file, run = write_config(tmp_path / "config.yaml", config), RolloutRun(config.run.uri)
    with command(tmp_path / "log", "run", str(file), prefix=without_override) as started:
        started.wait_until(lambda: open_parts(run))
        made = {path: run.storage.read_bytes(path) for path in run.storage.list_files("rollouts")}
        rollouts = Path(run.uri) / "rollouts"
        folders = [rollouts, *(path for path in rollouts.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        gate.open()
        assert started.wait() == 1, started.text
        assert "change the owner or the permissions" in started.text and "Traceback" not in started.text
    assert made.items() <= {path: run.storage.read_bytes(path) for path in run.storage.list_files("rollouts")}.items()
    assert run_status(run).failures
    for path in folders:
        path.chmod(0o755)
    with command(tmp_path / "log2", "run", str(file), prefix=without_override) as again:
        assert again.wait() == 0, again.text
    assert_equal(run, undisturbed)
    assert run_status(run).failures == []


def host(name: str) -> tuple[str, ...]:
    """What makes a process believe itself on another machine: its host name and its own process numbers."""
    spaces = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
    return (*spaces, "sh", "-c", f'hostname {shlex.quote(name)} && exec "$@"', "sh")


def test_two_drivers_at_once_on_two_hosts(tmp_path: Path, s3_bucket: str) -> None:
    """On a shared folder and on a bucket: one works, the other says who; when the host dies, the other takes over."""
    if subprocess.run([*host("there"), "true"], capture_output=True).returncode != 0:
        pytest.skip("this user may not make namespaces (unshare --uts --pid)")
    undisturbed = quiet_run(make_config(tmp_path / "quiet", prompts=1, gates=[Gate(tmp_path / "o", opened=True)]))
    for kind in ("folder", "bucket"):
        gate = Gate(tmp_path / f"gate-{kind}")
        engine = {"actors": 1, "lease_ttl_s": 12.0}
        config = make_config(tmp_path / kind, prompts=1, gates=[gate], engine=engine)
        fields = config.model_dump(mode="json", exclude_unset=True)
        if kind == "bucket":
            fields["run"] = {"uri": f"{s3_bucket}/{tmp_path.name}"}
            fields["storage"] = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(fields), encoding="utf-8")
        run = RolloutRun(fields["run"]["uri"])
        with (
            command(tmp_path / f"{kind}-a", "run", str(file), prefix=host("node-a")) as one,
            command(tmp_path / f"{kind}-b", "run", str(file), prefix=host("node-b")) as two,
        ):
            wait_until(lambda: one.process.poll() is not None or two.process.poll() is not None)
            refused, working = (one, two) if one.process.poll() is not None else (two, one)
            other = "node-b" if working is two else "node-a"
            assert refused.wait() == 3, refused.text
            assert f"is being worked on by root on {other} (lrag-ray run, process " in refused.text
            working.wait_until(partial(open_parts, run))
            assert f"on {other} " in (run_status(run).held_by or "")
            working.process.kill()
            working.process.wait()
        with command(tmp_path / f"{kind}-c", "run", str(file), prefix=host("node-c")) as successor:
            successor.wait_until(lambda: "this driver takes over" in successor.text)
            gate.open()
            assert successor.wait() == 0, successor.text
            assert "Waiting for a sign of life" in successor.text
        assert_equal(run, undisturbed)


INTERRUPTED_START = """
import os, signal, sys
import ray
from ray._private import node, worker

_, number, place, when, *arguments = sys.argv
owner, name = {"gcs": (node.Node, "start_gcs_server"), "raylet": (node.Node, "start_raylet"),
               "connect": (worker, "connect"), "init": (ray, "init")}[place]
original = getattr(owner, name)

def interrupting(*given, **options):
    if when == "before":
        os.kill(os.getpid(), getattr(signal, number))
    made = original(*given, **options)
    os.kill(os.getpid(), getattr(signal, number))
    return made

setattr(owner, name, interrupting)
from lrag_ray.__main__ import main
sys.argv = ["lrag-ray", *arguments]
main()
"""


@pytest.mark.parametrize(
    ("number", "place", "when"),
    [
        ("SIGTERM", "gcs", "after"),
        ("SIGINT", "raylet", "before"),
        ("SIGTERM", "raylet", "after"),
        ("SIGTERM", "connect", "before"),
        ("SIGINT", "connect", "after"),
        ("SIGTERM", "init", "after"),
    ],
)
def test_a_signal_while_ray_starts_leaves_no_process_and_no_lease(
    tmp_path: Path, number: str, place: str, when: str
) -> None:
    config = make_config(tmp_path / "run", prompts=1, engine={"actors": 1})
    file = write_config(tmp_path / "config.yaml", config)
    # Asserts that nothing that was started in it is left.
    with private_folder():
        ended = subprocess.run(
            [sys.executable, "-c", INTERRUPTED_START, number, place, when, "run", str(file)],
            cwd=REPOSITORY,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr and "interrupted" in ended.stderr
    assert all(one.is_released for one in holders(RolloutRun(config.run.uri).storage).values())


def test_a_signal_at_any_moment_of_a_run_gives_130(tmp_path: Path) -> None:
    """The moments are spread evenly over a run that nobody interrupts."""
    config = make_config(tmp_path / "run", prompts=1, engine={"actors": 1}, scoring={"suite": "preview"})
    file = write_config(tmp_path / "config.yaml", config)
    began = time.monotonic()
    with command(tmp_path / "log", "run", str(file)) as undisturbed:
        assert undisturbed.wait() == 0, undisturbed.text
    whole_s, moments = time.monotonic() - began, 10
    for moment in range(moments):
        shutil.rmtree(config.run.uri)
        number = signal.SIGTERM if moment % 2 else signal.SIGINT
        with private_folder(), command(tmp_path / f"log{moment}", "run", str(file)) as started:
            with suppress(subprocess.TimeoutExpired):
                started.process.wait((moment + 0.5) / moments * whole_s)
            # The program itself has begun: before that, Python ends by the signal.
            started.process.send_signal(number)
            code = started.wait()
            # It may have been done a little sooner this time.
            assert code == 130 or (moment == moments - 1 and code == 0), f"{moment}, {number.name}: {started.text}"
            assert "Traceback" not in started.text
        if Path(config.run.uri).exists():
            assert all(one.is_released for one in holders(RolloutRun(config.run.uri).storage).values())
        else:
            Path(config.run.uri).mkdir()

"""The private cluster of a run, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

PROGRAM = """
import os, signal, time
import ray
from ray._raylet import AuthenticationMode, get_authentication_mode
from lrag_ray.config.schema import EngineSection
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import ClusterError

with ray_session(EngineSection(cpus_per_actor=3)):
    assert ray.cluster_resources()["CPU"] >= 3
    assert get_authentication_mode() == AuthenticationMode.TOKEN
    with ray_session(EngineSection()):
        pass
    assert ray.is_initialized(), "a session inside another one must leave it alone"
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("SIGTERM is to do what Ctrl-C does")
assert not ray.is_initialized() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

try:
    with ray_session(EngineSection(gpus_per_actor=64)):
        pass
except ClusterError as error:
    assert "gpus_per_actor is 64" in str(error), error
else:
    raise AssertionError("no machine has 64 GPUs")
assert not ray.is_initialized()

tries = []

def slow(**_):
    tries.append("local")
    raise Exception("The current node timed out during startup.")

ray.init, init = slow, ray.init
try:
    with ray_session(EngineSection()):
        pass
except ClusterError as error:
    assert "no local Ray cluster can be started: The current node timed out" in str(error), error
assert len(tries) == 3
ray.init = init

for address in ("not an address", "127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:99999"):
    os.environ["RAY_ADDRESS"] = address
    try:
        with ray_session(EngineSection()):
            pass
    except ClusterError as error:
        assert f"{address!r} cannot be reached" in str(error), error
    else:
        raise AssertionError("no cluster is there")
"""


def test_a_local_cluster_asks_for_a_token_and_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not (tmp_path / ".ray").exists()

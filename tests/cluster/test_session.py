"""The private cluster of a run, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

REFUSED = """
import os, socket, threading
import ray
from lrag_ray.config.schema import EngineSection
from lrag_ray.engine import session
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import ClusterError

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

session._CONNECT_TIMEOUT_S = 0.5
mute, web = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))

def refuse():
    with web.accept()[0] as one:
        one.sendall(b"HTTP/1.1 400 Bad Request")

threading.Thread(target=refuse).start()

for address, said in (
    (f"127.0.0.1:{mute.getsockname()[1]}", "what listens there has said nothing for 0.5 s"),
    (f"127.0.0.1:{web.getsockname()[1]}", "cannot be reached: what listens there is not Ray"),
    ("127.0.0.1:9", "'127.0.0.1:9' cannot be reached"),
    ("not an address", "RAY_ADDRESS 'not an address' is not a Ray address; expected"),
    ("ray://127.0.0.1:9", "RAY_ADDRESS 'ray://127.0.0.1:9' is a Ray Client address"),
    ("127.0.0.1:99999", "RAY_ADDRESS '127.0.0.1:99999' is not a Ray address"),
    ("me:hunter2@127.0.0.1:9", "RAY_ADDRESS holds user info before an @"),
    ("ray://me:hunter2@127.0.0.1:9", "RAY_ADDRESS holds user info before an @"),
):
    os.environ["RAY_ADDRESS"] = address
    try:
        with ray_session(EngineSection()):
            pass
    except ClusterError as error:
        assert said in str(error) and "hunter2" not in str(error), error
    else:
        raise AssertionError("no cluster is there")

os.environ |= {"RAY_ADDRESS": "local", "RAY_TMPDIR": "/tmp/" + "x" * 105}
try:
    with ray_session(EngineSection()):
        pass
except ClusterError as error:
    assert "RAY_TMPDIR" in str(error) and "has 110 bytes" in str(error) and "such as /tmp" in str(error), error
else:
    raise AssertionError("the paths of sockets are too long")
assert not os.path.exists(os.environ["RAY_TMPDIR"])
"""


def test_what_cannot_be_a_cluster_is_refused_with_the_reason() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


EXPOSED = """
import glob, json, os, signal, stat, sys, time
import psutil, ray
from ray._raylet import AuthenticationMode, get_authentication_mode
from lrag_ray.config.schema import EngineSection
from lrag_ray.engine.session import ray_session

with ray_session(EngineSection(cpus_per_actor=3)):
    assert ray.cluster_resources()["CPU"] >= 3
    assert get_authentication_mode() == AuthenticationMode.TOKEN

    @ray.remote
    class Actor:
        def node(self):
            return ray.util.get_node_ip_address()

    actor = Actor.remote()
    assert ray.get(actor.node.remote()) == "127.0.0.1"
    assert ray.get_runtime_context().runtime_env == {}, "what Ray adds below `uv run`"
    # The agents of a node start behind its first actor.
    expected, deadline = {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}, time.time() + 60
    listeners = {}
    while not expected <= {name for name, _ in listeners} and time.time() < deadline:
        time.sleep(1)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            name = (process.cmdline() or [process.name()])[0].rsplit("/", 1)[-1].split(" ")[0]
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listeners[name, connection.laddr.port] = connection.laddr.ip
    (folder,) = glob.glob(os.environ["RAY_TMPDIR"] + "/*")
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    if sys.argv[1:] == ["die"]:
        os.kill(os.getpid(), 9)
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
assert glob.glob(os.environ["RAY_TMPDIR"] + "/*") == []
assert "AUTOSCALER_METRIC_PORT" in os.environ and "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
print(json.dumps([[name, ip] for (name, _), ip in listeners.items()]))
"""


def test_a_local_cluster_asks_for_a_token_listens_on_loopback_alone_and_leaves_nothing(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": folder, "HOME": str(tmp_path)}
        killed = subprocess.run([sys.executable, "-c", EXPOSED, "die"], env=environment, capture_output=True, text=True)
        assert killed.returncode == -9, killed.stderr
        assert len(list(Path(folder).iterdir())) == 1, "a driver that was killed cannot clean up"
        time.sleep(5)  # Ray's processes notice that their driver is gone.
        # Ray recognises `uv run` by the command line of a parent.
        (tmp_path / "run").write_text("import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))", "utf-8")
        command = ["uv", "run", sys.executable, "-c", EXPOSED]
        done = subprocess.run(
            command, executable=sys.executable, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert list(Path(folder).iterdir()) == [], "the next one does"
        assert not (tmp_path / ".ray").exists()
    listeners = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in listeners} >= {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    assert {ip.removeprefix("::ffff:") for _, ip in listeners} == {"127.0.0.1"}, listeners


CLOSING = """
import gc, os, signal, threading, time
import ray
from lrag_ray.config.schema import EngineSection
from lrag_ray.engine.session import ray_session
from lrag_ray.interrupts import ends_with_130

closed = threading.Event()

def drop_references():
    # What a search for cycles in another thread does at any moment; here it finds a reference every few milliseconds.
    while not closed.is_set():
        if gc.isenabled():
            cycle = [references.pop()]
            cycle.append(cycle)
            del cycle
            gc.collect()
        time.sleep(0.002)

def interrupted_shutdown(**options):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    shutdown(**options)
    assert not ray.is_initialized(), "it was cut short"
    print("shut down", flush=True)

with ends_with_130():
    try:
        with ray_session(EngineSection()):
            references = [ray.put(number) for number in range(5000)]
            threading.Thread(target=drop_references, daemon=True).start()
            shutdown, ray.shutdown = ray.shutdown, interrupted_shutdown
    finally:
        ray.shutdown = shutdown
        closed.set()
"""


def test_neither_signals_nor_other_threads_tear_up_the_end_of_a_session() -> None:
    """Ray's native code would end the process with exit code 1, and SIGTERM by the signal."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", CLOSING], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "shut down\n", "interrupted\n")

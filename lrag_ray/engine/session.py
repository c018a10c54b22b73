"""The Ray cluster of a run: the one at an address, or a private local one that ends with the run."""

from __future__ import annotations

import gc
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import ray
from ray._private import ray_constants

from lrag_ray.config.redaction import redact
from lrag_ray.config.schema import WorkersSection
from lrag_ray.engine.cluster_address import ClusterAddress, cluster_address
from lrag_ray.engine.head_watch import head_watch
from lrag_ray.engine.local_cluster import LOOPBACK, loopback_alone, private_folder
from lrag_ray.errors import ClusterError
from lrag_ray.interrupts import signals_wait
from lrag_ray.printable import printable
from lrag_ray.store.rollouts import without_cycle_search
from lrag_ray.store.scratch import remove_orphans

_CONNECT_TIMEOUT_S = 20.0
_START_TRIES = 3
_HTTP2_FRAME, _HTTP2_SETTINGS = 9, b"\x04"
"""Bytes before the content of a frame, the fourth of which is its kind; and the kind that opens a connection."""
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _HTTP2_SETTINGS + bytes(5)
"""What a client says first, of gRPC too (RFC 9113, section 3.4); a server answers with a frame of the same kind."""


@contextmanager
def ray_session(engine: WorkersSection) -> Iterator[None]:
    """Connect for the time of the block; a connection that exists already is used and left alone.

    `engine.address` or RAY_ADDRESS name a cluster; without them a local one is started, with a token that only
    this process and its workers know. Meanwhile SIGTERM (``kill``, a scheduler, ``ray job stop``) does what Ctrl-C
    does, unless the caller has a handler of its own. Raises ClusterError.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address(engine)
    remove_orphans()
    with private_folder() if address is None else nullcontext() as folder:
        yield from _session(engine, address, folder)


def _session(engine: WorkersSection, address: ClusterAddress | None, folder: Path | None) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Silences a FutureWarning; actors without a GPU must not see one anyway.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Below `uv run`, Ray would upload the working directory and start every worker by that command. Nodes have an
    # environment of their own. The variable of this name is read when Ray is imported.
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    with _sigterm_as_ctrl_c():
        try:
            try:
                if folder is None:
                    assert address is not None
                    _require_listener(address)
                    ray.init(address=address.text, log_to_driver=False, logging_level=logging.ERROR)
                else:
                    _start_local(engine, folder)
            except ClusterError:
                raise
            except Exception as error:
                # Ray raises whatever comes, and plain Exception where a node takes more than half a minute to start.
                where = (
                    f"the Ray cluster at {address.text!r} cannot be reached"
                    if address
                    else "no local Ray cluster can be started"
                )
                raise ClusterError(
                    f"{where}: {redact(str(error))}. Check engine.address and RAY_ADDRESS (and RAY_AUTH_MODE, "
                    "RAY_AUTH_TOKEN where the cluster asks for a token), or run `lrag-ray doctor`"
                ) from error
            with head_watch(ray.get_runtime_context().gcs_address, _warn):
                yield
        finally:
            _disconnect()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, unless the caller has a handler of its own; `ray.init` belongs into it."""
    before = signal.getsignal(signal.SIGTERM)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    set_by_ray, native = ray._private.utils.set_sigterm_handler, ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER
    # Ray's handler in Python ends the process after half a minute of draining, the one in its native code at once, with
    # a crash report; and the native shutdown leaves the signal with the system's default action.
    ray._private.utils.set_sigterm_handler = lambda _: None
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    signal.signal(signal.SIGTERM, signal.default_int_handler if before == signal.SIG_DFL else before)
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = set_by_ray
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = native
        signal.signal(signal.SIGTERM, before)


def _disconnect() -> None:
    # Ray ends the process with exit code 1, without a word, where its objects are used once its native code has shut
    # down: by the shutdown at exit that follows one that was interrupted, and by a search for cycles, in any thread,
    # that finds references while the shutdown is under way.
    with signals_wait(), without_cycle_search():
        gc.collect()
        ray.shutdown()


def _warn(text: str) -> None:
    # Not through the receiver of events, which belongs to the main thread: that may be the one that waits for Ray.
    print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


def _require_listener(address: ClusterAddress) -> None:
    """OSError where nobody listens there, or not Ray: Ray itself would try for a quarter of an hour."""
    if address.host is None:
        return
    with socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S) as there:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        there.sendall(_HTTP2_HELLO)
        try:
            with there.makefile("rb") as said:
                kind = said.read(_HTTP2_FRAME)[3:4]
        except TimeoutError:
            raise TimeoutError(f"what listens there has said nothing for {_CONNECT_TIMEOUT_S:g} s") from None
    if kind != _HTTP2_SETTINGS:
        raise ConnectionError("what listens there is not Ray")


def _start_local(engine: WorkersSection, folder: Path) -> None:
    # Other users of this machine reach its ports: it asks for a token unless the user says otherwise (RAY_AUTH_MODE).
    # Without one in the environment Ray would write it into the home folder, which switches later clusters to tokens.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for tries_left in reversed(range(_START_TRIES)):
        try:
            with loopback_alone():
                ray.init(
                    address="local",
                    num_cpus=max(cpus, math.ceil(engine.cpus_per_actor)),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder),
                )
            break
        except Exception as error:
            # Ray gives a node half a minute, which cannot be set; a machine that is busy for a while needs more.
            if not tries_left or "timed out during startup" not in str(error):
                raise
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus < engine.gpus_per_actor:
        raise ClusterError(
            f"engine.gpus_per_actor is {engine.gpus_per_actor:g} and this machine has {gpus:g} GPUs, so no actor would "
            "ever start. Set it to 0 to run on the CPU, or engine.address to a cluster with GPUs"
        )

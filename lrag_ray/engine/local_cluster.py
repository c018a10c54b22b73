"""The private Ray cluster of a run: on loopback alone, in a folder of its own that ends with it.

Ray resolves loopback addresses to one that other machines reach, binds most servers to all interfaces, makes its
folders writable for everybody and leaves them behind. All of that suits clusters of several machines, not this one.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._private import ray_constants

from lrag_ray.errors import ClusterError

LOOPBACK = "127.0.0.1"
_PREFIX = "lrag"
_RANDOM_BYTES = 2
_NAME = re.compile(rf"{_PREFIX}[0-9a-f]{{{2 * _RANDOM_BYTES}}}")
_LOCK = "driver.lock"
_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
_RAY_FOLDER = "r"
"""Below the private folder, because Ray opens its own to everybody."""
_BELOW = f"/{_RAY_FOLDER}/session_2026-01-01_00-00-00_000000_{{pid}}/sockets/plasma_store"
"""The longest socket that Ray makes below its folder."""
_YOUNG_S = 60.0
"""A folder without a lock may be of a driver that has just made it."""
_METRICS_OFF = {
    "RAY_enable_metrics_collection": "0",
    # No port has this number: the two servers of the head have no other switch.
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
"""Ray's metrics answer without a token. Who wants them sets these variables."""


def folder_for_ray() -> Path:
    """Where the folders of local clusters are made; ClusterError where Ray's sockets would not work below it."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "RAY_TMPDIR")
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    below = len(_BELOW.format(pid=os.getpid())) + len(_PREFIX) + 2 * _RANDOM_BYTES + len("/")
    longest, length = _SOCKET_PATH_BYTES - below, len(os.fsencode(base))
    if length > longest:
        raise ClusterError(
            f"{variable} {str(base)!r} has {length} bytes and Ray's sockets below it would have paths longer than the "
            f"{_SOCKET_PATH_BYTES} bytes that the system allows. Fix: set RAY_TMPDIR to a folder of at most {longest} "
            "bytes, such as /tmp"
        )
    return base


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for Ray that only this user can enter; it is removed afterwards, and those of dead drivers before.

    Raises ClusterError where none can be made, or Ray's sockets would not work in it.
    """
    base = folder_for_ray()
    folder = base / f"{_PREFIX}{secrets.token_hex(_RANDOM_BYTES)}"
    try:
        base.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(base)
        folder.mkdir(mode=0o700)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise ClusterError(
            f"no folder for Ray can be made in {str(base)!r}: {error.strerror}. Fix: set RAY_TMPDIR to a folder that "
            "this user may write"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder / _RAY_FOLDER
        finally:
            _remove(folder)


def _remove_abandoned(base: Path) -> None:
    """Remove the folders of this user's drivers that are over: nobody holds their lock."""
    for folder in base.glob(f"{_PREFIX}????"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.geteuid() or folder.is_symlink() or not folder.is_dir():
                continue
            if not (folder / _LOCK).is_file():
                if _is_left_over(folder) and time.time() - status.st_mtime > _YOUNG_S:
                    _remove(folder)
                continue
            with (folder / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _is_left_over(folder: Path) -> bool:
    """Whether a folder without a lock is empty, or holds what Ray's late processes made after it was removed."""
    if _NAME.fullmatch(folder.name) is None:
        return False
    inside = [entry.name for entry in folder.iterdir()]
    if inside != [_RAY_FOLDER]:
        return not inside
    return all(entry.name.startswith("session_") for entry in (folder / _RAY_FOLDER).iterdir())


def _remove(folder: Path) -> None:
    # Ray's processes may write their last lines meanwhile.
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextmanager
def loopback_alone() -> Iterator[None]:
    """Within it Ray takes loopback for this machine's address, as it does where it does not serve other machines.

    Raises ClusterError where a cluster was started, which the caller ends, and has another address all the same.
    """
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(variable), ray_constants.ENABLE_RAY_CLUSTER
    for name, value in _METRICS_OFF.items():
        os.environ.setdefault(name, value)
    # Ray has read the variable when it was imported; the processes that it starts read it again.
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before[0]
    if not ray.get_runtime_context().gcs_address.startswith(f"{LOOPBACK}:"):
        raise ClusterError(
            f"Ray {ray.__version__} serves a local cluster beyond this machine, which a run does not allow. "
            "Fix: install the version of constraints.txt"
        )

"""Whether two machines see the same run at one address."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence

from lrag_ray.errors import StorageError
from lrag_ray.store.address import Storage
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.run_dir import RUN_FILE

LOOKS = 3
LOOK_AGAIN_S = 0.5
"""A shared folder may show a file a little later to another node."""


def sees_run(run: RolloutRun, created_at: str) -> bool:
    """Whether this machine finds the run that was created at that time, and not an empty folder or another run."""
    for look in range(LOOKS):
        if look:
            time.sleep(LOOK_AGAIN_S)
        found = run.read()
        if found is not None and found.created_at == created_at:
            return True
    return False


def require_run(run: RolloutRun, created_at: str) -> None:
    """StorageError unless this machine sees the run."""
    if not sees_run(run, created_at):
        raise StorageError(not_shared(run.storage, [platform.node()]))


def not_shared(storage: Storage, nodes: Sequence[str]) -> str:
    """The message about nodes that see other storage at the same address."""
    named = ", ".join(nodes)
    if storage.is_local:
        return (
            f"{storage.uri} is not the same folder on every node: {RUN_FILE} was not found there on {named}. Set "
            "run.uri to a folder that all nodes mount under the same path (NFS, Lustre), or to a bucket "
            "(run.uri=s3://bucket/run)"
        )
    return (
        f"{storage.uri} is not the same storage on every node: {RUN_FILE} was not found there on {named}. Set "
        "storage.endpoint_url in the configuration, or the same AWS_ENDPOINT_URL on every node"
    )

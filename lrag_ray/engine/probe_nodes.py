"""The start-up probe: every node must see the run, its writes must be seen here, and its clock must be about right.

A folder that exists on every node without being shared is the mistake that costs most: each node would fill its own.
"""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lrag_ray.config.redaction import redact
from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import ClusterError, StorageError
from lrag_ray.events import Notice, Progress
from lrag_ray.store.address import PROBE_PREFIX, Storage
from lrag_ray.store.run_dir import RUN_FILE, RunDirectory

CLOCK_SKEW_S = 5.0
"""A node whose clock is off by more than this is told of."""
_LONGEST_WAIT_S = 120.0
_LOOKS = 3
_LOOK_AGAIN_S = 0.5


class NodeReport(NamedTuple):
    """What one node found."""

    wrote: str | None
    """The file that it wrote; None where it does not see the run."""
    create_only: bool
    """It could not create what exists."""
    clock_s: float
    """Its time when it was done, in seconds since 1970."""


def probe_nodes(run: RunDirectory, config: RunConfig, progress: Progress) -> None:
    """Ask every node that may work on the run whether it sees the same storage. Needs Ray and ``run.json``.

    Raises StorageError naming the nodes that see another folder or bucket, and ClusterError naming those that may not
    read or write there or lack this program.
    Clocks that differ, and nodes that do not answer, are told as warnings. A cluster of one node, which is this one,
    is not asked.
    """
    nodes = _nodes_that_work(config)
    if len(nodes) < 2 and not ray.util.client.ray.is_connected():
        return
    paths = {node_id: f"{PROBE_PREFIX}{secrets.token_hex(8)}" for node_id in nodes}
    try:
        reports = _ask(run, nodes, paths, progress)
        unseen = [name for name, report in reports.items() if not (report.wrote and _visible(run, report.wrote))]
    finally:
        for path in paths.values():
            # What cannot be removed now is found by `lrag-ray gc`.
            with suppress(StorageError):
                run.storage.remove(path)
    if unseen:
        raise StorageError(not_shared(run.storage, unseen))
    if any(not report.create_only for report in reports.values()):
        named = ", ".join(name for name, report in reports.items() if not report.create_only)
        text = f"on {named} {run.uri} does not honour create-only writes: let one driver work at a time"
        progress(Notice(text, warning=True))


def _ask(
    run: RunDirectory, nodes: Mapping[str, str], paths: Mapping[str, str], progress: Progress
) -> dict[str, NodeReport]:
    """Reports by node name; nodes that were lost or are silent are told of and left out."""
    created_at = run.require().created_at
    task = ray.remote(probe_node)
    asked = {
        task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(run, created_at, paths[node_id]): name
        for node_id, name in nodes.items()
    }
    reports: dict[str, NodeReport] = {}
    troubles: list[str] = []
    pending = list(asked)
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        name = asked[done[0]]
        try:
            report = reports[name] = ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            troubles.append(f"{name}: {redact(str(error.cause))}")
        except ray.exceptions.RayError as error:
            progress(Notice(f"node {name} was lost while it was asked about the storage: {error}", warning=True))
        else:
            tell_of_skew(name, report.clock_s - time.time(), progress)
    if troubles:
        raise ClusterError(
            "these nodes cannot work on the run:\n  "
            + "\n  ".join(troubles)
            + "\nMend what they say there, or end these nodes; every node needs the same environment as this one"
        )
    for ref in pending:
        text = f"node {asked[ref]} did not tell within {_LONGEST_WAIT_S:g} s whether it sees {run.uri}"
        progress(Notice(text, warning=True))
    return reports


def probe_node(run: RunDirectory, created_at: str, path: str) -> NodeReport:
    """What the node that this runs on finds: sees the run, writes `path` beside it, and cannot create it twice.

    StorageError where it may not read or write.
    """
    if not sees_run(run, created_at):
        return NodeReport(None, True, time.time())
    first, second = (f"{path} {secrets.token_hex(4)}".encode() for _ in range(2))
    run.storage.create(path, first)
    return NodeReport(path, not run.storage.create(path, second), time.time())


def sees_run(run: RunDirectory, created_at: str) -> bool:
    """Whether this node finds the run that was created at that time, and not an empty folder or another run."""
    for look in range(_LOOKS):
        if look:
            # A shared folder may show a file a little later to another node.
            time.sleep(_LOOK_AGAIN_S)
        found = run.read()
        if found is not None and found.created_at == created_at:
            return True
    return False


def require_run(run: RunDirectory, created_at: str) -> None:
    """For a worker on a node that joined later: StorageError unless this node sees the run."""
    if not sees_run(run, created_at):
        raise StorageError(not_shared(run.storage, [platform.node()]))


def not_shared(storage: Storage, nodes: Sequence[str]) -> str:
    """What to tell about nodes that see another storage at the same address."""
    named = ", ".join(nodes)
    if storage.is_local:
        return (
            f"{storage.uri} is not the same folder on every node: {named} do(es) not find the run's {RUN_FILE} there. "
            "Two ways out: put run.uri on a folder that all nodes mount under the same path (NFS, Lustre), or on a "
            "bucket (run.uri=s3://bucket/run)"
        )
    return (
        f"{storage.uri} is not the same storage on every node: {named} do(es) not find the run's {RUN_FILE} there. Set "
        "storage.endpoint_url in the configuration, or the same AWS_ENDPOINT_URL on every node"
    )


def tell_of_skew(node: str, seconds: float, progress: Progress) -> None:
    """Warn of a clock that is so many seconds ahead of ours (negative: behind)."""
    if abs(seconds) > CLOCK_SKEW_S:
        progress(
            Notice(
                f"the clock of node {node} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this "
                "machine's: times in records and rates will be off, and S3 refuses more than 15 minutes. Set it "
                "(chrony, ntpd or timedatectl)",
                warning=True,
            )
        )


def _nodes_that_work(config: RunConfig) -> Mapping[str, str]:
    """Names by Ray's id of the living nodes with room for any work; a head node without CPUs has none."""
    least = min(config.engine.cpus_per_actor, config.scoring.cpus_per_worker)
    return {
        node["NodeID"]: _name(node)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= least
    }


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _visible(run: RunDirectory, path: str) -> bool:
    for look in range(_LOOKS):
        if look:
            time.sleep(_LOOK_AGAIN_S)
        try:
            run.storage.read_bytes(path)
        except FileNotFoundError:
            continue
        return True
    return False

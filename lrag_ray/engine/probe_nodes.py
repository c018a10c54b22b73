"""The start-up probe: every node must see the run and the weights, its writes must be seen here, its clock be right.

A folder that exists on every node without being shared is the mistake that costs most: each node would fill its own.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lrag_ray.config.redaction import redact
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.oom import this_node
from lrag_ray.errors import ClusterError, StorageError
from lrag_ray.events import Listener, Notice
from lrag_ray.store.address import PROBE_PREFIX
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.shared import LOOK_AGAIN_S, LOOKS, not_shared, sees_run
from lrag_ray.weights.local import sizes_at
from lrag_ray.weights.needs import needs_of

CLOCK_SKEW_S = 5.0
"""A clock that is off by more than this is reported."""
_LONGEST_WAIT_S = 120.0


class NodeReport(NamedTuple):
    """What one node found."""

    wrote: str | None
    """The file that it wrote; None where it does not see the run."""
    create_only: bool
    """It could not create what exists."""
    clock_s: float
    """Its time when it was done, in seconds since 1970."""
    absent: tuple[str, ...] = ()
    """Addresses of weights at which it finds nothing."""


def probe_nodes(run: RolloutRun, config: RunConfig, listener: Listener) -> None:
    """Ask every node that may work on the run whether it sees the same storage. Needs Ray and ``run.json``.

    Raises StorageError naming the nodes that see another folder or bucket, and ClusterError naming those that may not
    read or write there, lack this program or find no weights.
    Clocks that differ and nodes that do not answer are reported as warnings. A cluster of one node, this one, is not
    asked.
    """
    nodes = _nodes_that_work(config)
    if not ray.util.client.ray.is_connected() and set(nodes) <= {this_node()}:
        return
    paths = {node_id: f"{PROBE_PREFIX}{secrets.token_hex(8)}" for node_id in nodes}
    try:
        weights = tuple(dict.fromkeys(need.address for need in needs_of(config) if need.kind != "prompts"))
        reports = _ask(run, nodes, paths, weights, listener)
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
        listener(Notice(text, warning=True))


def _ask(
    run: RolloutRun,
    nodes: Mapping[str, str],
    paths: Mapping[str, str],
    weights: Sequence[str],
    listener: Listener,
) -> dict[str, NodeReport]:
    """Reports by node name; nodes that were lost or are silent are reported and left out."""
    created_at = run.require().created_at
    task = ray.remote(probe_node)
    asked = {
        task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(run, created_at, paths[node_id], weights): name
        for node_id, name in nodes.items()
    }
    reports: dict[str, NodeReport] = {}
    problems: list[str] = []
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
            problems.append(f"{name}: {redact(str(error.cause))}")
        except ray.exceptions.RayError as error:
            listener(Notice(f"node {name} was lost while it was asked about the storage: {error}", warning=True))
        else:
            if report.absent:
                problems.append(f"{name}: no weights at {', '.join(map(redact, report.absent))}")
            report_skew(name, report.clock_s - time.time(), listener)
    if problems:
        raise ClusterError(
            "these nodes cannot work on the run:\n  "
            + "\n  ".join(problems)
            + "\nFix what they report, or end these nodes; every node needs the same environment as this one"
        )
    for ref in pending:
        text = f"node {asked[ref]} did not tell within {_LONGEST_WAIT_S:g} s whether it sees {run.uri}"
        listener(Notice(text, warning=True))
    return reports


def probe_node(run: RolloutRun, created_at: str, path: str, weights: Sequence[str] = ()) -> NodeReport:
    """What the node that this runs on finds: sees the run, writes `path` beside it, and cannot create it twice.

    It looks for `weights`, absolute paths and addresses. StorageError where it may not read or write.
    """
    absent = tuple(address for address in weights if not sizes_at(address))
    if not sees_run(run, created_at):
        return NodeReport(None, True, time.time(), absent)
    first, second = (f"{path} {secrets.token_hex(4)}".encode() for _ in range(2))
    run.storage.create(path, first)
    return NodeReport(path, not run.storage.create(path, second), time.time(), absent)


def report_skew(node: str, seconds: float, listener: Listener) -> None:
    """Warn of a clock that is `seconds` ahead of ours (negative: behind)."""
    if abs(seconds) > CLOCK_SKEW_S:
        listener(
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


def _visible(run: RolloutRun, path: str) -> bool:
    for look in range(LOOKS):
        if look:
            time.sleep(LOOK_AGAIN_S)
        try:
            run.storage.read_bytes(path)
        except FileNotFoundError:
            continue
        return True
    return False

"""Whether the kernel's OOM killer ended a worker: Ray reports any process that vanishes in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_ANSWER_WITHIN_S = 5.0


class WorkerLocation(NamedTuple):
    """Where a worker runs, reported when it is ready."""

    node: str
    """Ray's node id."""
    oom_kills: int
    """Processes that the node's kernel had killed for memory by then."""


def worker_location() -> WorkerLocation:
    """Location of the calling process."""
    return WorkerLocation(this_node(), oom_kills())


def this_node() -> str:
    """Node id of the calling process."""
    return str(ray.get_runtime_context().get_node_id())


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for memory since it booted; 0 where it does not say."""
    vmstat = Path("/proc/vmstat")
    lines = vmstat.read_text(encoding="ascii").splitlines() if vmstat.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class OomKills:
    """Kill counts of the nodes, so that each kill explains one death."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def note(self, location: WorkerLocation) -> None:
        """A worker is ready."""
        self._seen[location.node] = max(location.oom_kills, self._seen.get(location.node, 0))

    def explains(self, error: Exception, node: str | None) -> bool:
        """Whether a worker that died on `node` was, as far as can be known, killed for memory. Asks the node."""
        # Of a node that is gone Ray says something else.
        if node not in self._seen or not isinstance(error, ActorDiedError) or "SYSTEM_ERROR" not in str(error):
            return False
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(oom_kills).remote()
        try:
            kills = int(ray.get(asked, timeout=_ANSWER_WITHIN_S))
        except (GetTimeoutError, RayError):
            return False
        before, self._seen[node] = self._seen[node], kills
        return kills > before

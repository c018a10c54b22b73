"""Where a worker lives, and whether the kernel killed it there for memory, which Ray cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_ANSWER_WITHIN_S = 5.0


class Place(NamedTuple):
    """What a worker says of its node when it is ready."""

    node: str
    """Ray's id."""
    oom_kills: int
    """Processes that the node's kernel had killed for memory by then."""


def this_place() -> Place:
    """Where the caller lives."""
    return Place(this_node(), oom_kills())


def this_node() -> str:
    """Id of the caller's node."""
    return str(ray.get_runtime_context().get_node_id())


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for memory since it started; 0 where it does not tell."""
    vmstat = Path("/proc/vmstat")
    lines = vmstat.read_text(encoding="ascii").splitlines() if vmstat.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


class OomKills:
    """Counts of the nodes, so that each kill explains one death."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def note(self, place: Place) -> None:
        """A worker is ready."""
        self._seen[place.node] = max(place.oom_kills, self._seen.get(place.node, 0))

    def explains(self, error: Exception, node: str | None) -> bool:
        """Whether a worker that died on `node` was, as far as can be known, killed for memory. Asks the node."""
        # Ray says the same of any process that vanishes; of a node that is gone it says something else.
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

"""How many workers a cluster has room for, by nodes: arithmetic on what Ray says of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ray
from ray._private.state import state as cluster_state

from lrag_ray.engine.oom import this_node

_ROUNDING = 1e-6
"""Ten shares of 0.1 GPU are one GPU."""


class NodeRoom(NamedTuple):
    """What a node has in all, whoever uses it."""

    cpus: float
    gpus: float
    memory: float
    """Bytes that Ray lets actors reserve."""


class WorkerShape(NamedTuple):
    """What every worker takes of its node, beside the memory that its items need."""

    cpus: float
    gpus: float

    def slots(self, node: NodeRoom) -> int:
        """Workers that fit on `node`, memory aside. A share of a GPU is never spread over two."""
        slots = int(node.cpus / self.cpus + _ROUNDING)
        if self.gpus >= 1:
            slots = min(slots, int(node.gpus / self.gpus + _ROUNDING))
        elif self.gpus > 0:
            slots = min(slots, int(node.gpus) * int(1 / self.gpus + _ROUNDING))
        return slots


class PoolSize(NamedTuple):
    """How many workers to have."""

    least: int
    """Asked for even without room: pending workers are the demand that makes a cluster scale up."""
    most: int | None
    """None: as many as there is room for."""


def wanted_workers(size: PoolSize, shape: WorkerShape, nodes: Iterable[NodeRoom], needs: Sequence[int]) -> list[int]:
    """Memory reservations of the workers to have, largest first.

    `needs` are the amounts that items need, largest first. Each node gets as many workers with the largest as it has
    memory for, and smaller ones in its remaining slots; what `size.least` asks for beyond that wants the largest.
    """
    room: list[int] = []
    for node in nodes:
        slots, memory = shape.slots(node), node.memory
        for need in needs:
            fit = min(slots, int(memory / need)) if need else slots
            room += [need] * fit
            slots -= fit
            memory -= need * fit
    room = sorted(room, reverse=True)[: size.most]
    return [needs[0]] * (size.least - len(room)) + room if needs else []


def draining_nodes() -> set[str]:
    """Ids of nodes that are about to be taken away; Ray places nothing on them any more. Costs 0.3 ms."""
    return set(cluster_state.get_draining_nodes())


def this_node_drains() -> bool:
    """Whether the caller's node is about to be taken away."""
    return this_node() in draining_nodes()


def usable_nodes(draining: set[str]) -> list[NodeRoom]:
    """The nodes on which Ray places workers."""
    rooms = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in draining:
            has = node["Resources"]
            rooms.append(NodeRoom(has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0)))
    return rooms


def cannot_grow(address: str | None, nodes: Sequence[NodeRoom]) -> bool:
    """Whether the cluster (at `engine.address`) is a private one on this machine, which no node can join."""
    # A head without CPUs waits for nodes.
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local" and len(nodes) == 1 and nodes[0].cpus > 0

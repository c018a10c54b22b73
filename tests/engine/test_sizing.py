from __future__ import annotations

import pytest

from lrag_ray.engine.sizing import NodeRoom, PoolSize, WorkerShape, wanted_workers

GB = 10**9


@pytest.mark.parametrize(
    ("shape", "node", "slots"),
    [
        (WorkerShape(1, 0), NodeRoom(4, 0, 0), 4),
        (WorkerShape(1, 1), NodeRoom(64, 8, 0), 8),
        (WorkerShape(4, 1), NodeRoom(16, 8, 0), 4),
        (WorkerShape(1, 2), NodeRoom(64, 7, 0), 3),
        (WorkerShape(0.1, 0.25), NodeRoom(64, 2, 0), 8),
        (WorkerShape(0.1, 0.1), NodeRoom(64, 1, 0), 10),
        # Two of 0.4 fit on a GPU, and no worker is spread over two GPUs.
        (WorkerShape(0.1, 0.4), NodeRoom(64, 2, 0), 4),
        (WorkerShape(1, 1), NodeRoom(64, 0, 0), 0),
    ],
)
def test_slots_of_a_node(shape: WorkerShape, node: NodeRoom, slots: int) -> None:
    assert shape.slots(node) == slots


NODES = [NodeRoom(4, 0, 100 * GB), NodeRoom(2, 0, 10 * GB)]


@pytest.mark.parametrize(
    ("size", "needs", "wanted"),
    [
        (PoolSize(3, 3), [0], [0, 0, 0]),
        # A number is asked for always: what has no room is the demand that makes a cluster grow.
        (PoolSize(8, 8), [0], [0] * 8),
        (PoolSize(1, None), [0], [0] * 6),
        (PoolSize(1, 5), [0], [0] * 5),
        (PoolSize(7, 9), [0], [0] * 7),
        # 100 GB hold two histories of 45; the node's other slots serve rollouts without.
        (PoolSize(1, None), [45 * GB, 0], [45 * GB, 45 * GB, 0, 0, 0, 0]),
        (PoolSize(1, None), [45 * GB, 8 * GB], [45 * GB, 45 * GB, 8 * GB, 8 * GB]),
        (PoolSize(3, 3), [45 * GB, 0], [45 * GB, 45 * GB, 0]),
        # No node has so much: workers of that size are wanted only when nothing smaller is left.
        (PoolSize(2, 2), [500 * GB, 0], [0, 0]),
        (PoolSize(2, 2), [500 * GB], [500 * GB, 500 * GB]),
        (PoolSize(2, 2), [], []),
    ],
)
def test_workers_that_are_wanted(size: PoolSize, needs: list[int], wanted: list[int]) -> None:
    assert wanted_workers(size, WorkerShape(1, 0), NODES, needs) == wanted

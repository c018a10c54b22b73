"""The queue of a stage's tasks, and which of them a worker takes next."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from typing import Generic, Literal, NamedTuple

from lrag_ray.stages.spec import Payload, Task

AFFINITY_SPAN = 4
"""A worker prefers tasks of the group it holds, up to this many orders ahead of the earliest queued task."""

Turn = Literal["first", "fresh", "last"]
"""first: was interrupted through no fault of its own. last: raised once and may raise again, so others go before it."""

_RANKS: Mapping[Turn, int] = {"first": 0, "fresh": 1, "last": 2}


class _Entry(NamedTuple, Generic[Payload]):
    """Sorts by its first three fields; no two have the same `number`."""

    rank: int
    order: int
    number: int
    task: Task[Payload]


class TaskQueue(Generic[Payload]):
    """Taking and putting back cost a logarithm of its length, times the number of distinct (group, memory, batch)."""

    def __init__(self, tasks: Collection[Task[Payload]]) -> None:
        self._shelves: dict[tuple[str, int, str], list[_Entry[Payload]]] = {}
        self._count = self._number = 0
        for task in tasks:
            self.put(task, "fresh")

    def __len__(self) -> int:
        return self._count

    def put(self, task: Task[Payload], turn: Turn) -> None:
        """Queue a task."""
        entry = _Entry(_RANKS[turn], task.order, self._number, task)
        heapq.heappush(self._shelves.setdefault((task.group, task.memory, task.batch), []), entry)
        self._number += 1
        self._count += 1

    def needs(self) -> list[int]:
        """Distinct amounts of memory that queued tasks need, in bytes, largest first."""
        return sorted({memory for (_, memory, _), shelf in self._shelves.items() if shelf}, reverse=True)

    def turns(self, at_once: int) -> int:
        """How many times a worker takes something until nothing is left, if batches are taken `at_once`."""
        return sum(-(-len(shelf) // at_once) if batch else len(shelf) for (*_, batch), shelf in self._shelves.items())

    def example(self, memory: int) -> Task[Payload]:
        """The first queued task that needs this amount of memory."""
        return min(shelf[0] for (_, need, _), shelf in self._shelves.items() if shelf and need == memory).task

    def take(
        self, memory: int, held: str | None, holders: Mapping[str, int], *, spare_small: bool = False
    ) -> Task[Payload] | None:
        """The task for a worker that reserved `memory` bytes and holds the group `held`; None if none fits.

        The earliest task, or a slightly later one of the group that the worker holds, or else one of the group that
        the fewest other workers hold (`holders` counts them). `spare_small` leaves small tasks to workers that can do
        nothing else.
        """
        fitting = [(shelf[0], kind) for kind, shelf in self._shelves.items() if shelf and kind[1] <= memory]
        if not fitting:
            return None
        earliest = min(entry for entry, _ in fitting)
        _, kind = min(
            (
                (group != held, -need if spare_small else 0, 0 if group == held else holders.get(group, 0), entry),
                (group, need, batch),
            )
            for entry, (group, need, batch) in fitting
            if entry.rank == earliest.rank and entry.order <= earliest.order + AFFINITY_SPAN
        )
        return self._pop(kind)

    def take_beside(self, task: Task[Payload], most: int) -> list[Task[Payload]]:
        """Up to `most` tasks of the batch of a task that was taken, in order."""
        kind = (task.group, task.memory, task.batch)
        count = min(most, len(self._shelves[kind])) if task.batch else 0
        return [self._pop(kind) for _ in range(count)]

    def _pop(self, kind: tuple[str, int, str]) -> Task[Payload]:
        self._count -= 1
        return heapq.heappop(self._shelves[kind]).task

"""Items of work that wait for a worker, and which of them a worker takes next."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

Payload = TypeVar("Payload")

AFFINITY_SPAN = 4
"""A worker prefers items of the group it holds up to so many orders ahead of the earliest item that waits."""


@dataclass(frozen=True)
class WorkItem(Generic[Payload]):
    """A piece of work."""

    key: str
    """Unique name."""
    order: int
    """Items are begun in this order, but see `AFFINITY_SPAN`."""
    group: str
    """What a worker must hold for it (the backbone); changing it is expensive."""
    payload: Payload
    progress: int = 0
    """How far it is already, in the unit of `PoolListener.progress_of`."""
    memory: int = 0
    """Bytes of host memory that its worker must have reserved."""


@dataclass(frozen=True)
class Yielded:
    """Returned instead of a result by a worker that must go, such as one on a draining node.

    What it had done is stored. Its item waits again, before all others; no attempt is counted and the worker is ended.
    """

    reason: str


Turn = Literal["first", "fresh", "last"]
"""first: was interrupted through no fault of its own. last: what raised once may raise again, let the others go."""

_RANKS: Mapping[Turn, int] = {"first": 0, "fresh": 1, "last": 2}


class _Entry(NamedTuple, Generic[Payload]):
    """Sorts by its first three fields; no two have the same `number`."""

    rank: int
    order: int
    number: int
    item: WorkItem[Payload]


class WaitingItems(Generic[Payload]):
    """Taking and putting back cost a logarithm of what waits, times the few kinds of (group, memory) there are."""

    def __init__(self, items: Collection[WorkItem[Payload]]) -> None:
        self._shelves: dict[tuple[str, int], list[_Entry[Payload]]] = {}
        self._count = self._number = 0
        for item in items:
            self.put(item, "fresh")

    def __len__(self) -> int:
        return self._count

    def put(self, item: WorkItem[Payload], turn: Turn) -> None:
        """Let an item wait."""
        entry = _Entry(_RANKS[turn], item.order, self._number, item)
        heapq.heappush(self._shelves.setdefault((item.group, item.memory), []), entry)
        self._number += 1
        self._count += 1

    def needs(self) -> list[int]:
        """Memory that waiting items need, in bytes, each amount once, largest first."""
        return sorted({memory for (_, memory), shelf in self._shelves.items() if shelf}, reverse=True)

    def example(self, memory: int) -> WorkItem[Payload]:
        """The first waiting item that needs so much memory."""
        return min(shelf[0] for (_, need), shelf in self._shelves.items() if shelf and need == memory).item

    def take(
        self, memory: int, held: str | None, holders: Mapping[str, int], *, spare_small: bool = False
    ) -> WorkItem[Payload] | None:
        """The item for a worker with so much memory that holds the group `held`; None if nothing that waits fits.

        The earliest item, or one slightly later of the group that the worker holds, or else that fewest others hold
        (`holders` counts them). `spare_small` leaves small items to workers that can do nothing else.
        """
        fitting = [(shelf[0], kind) for kind, shelf in self._shelves.items() if shelf and kind[1] <= memory]
        if not fitting:
            return None
        earliest = min(entry for entry, _ in fitting)
        _, kind = min(
            (
                (group != held, -need if spare_small else 0, 0 if group == held else holders.get(group, 0), entry),
                (group, need),
            )
            for entry, (group, need) in fitting
            if entry.rank == earliest.rank and entry.order <= earliest.order + AFFINITY_SPAN
        )
        self._count -= 1
        return heapq.heappop(self._shelves[kind]).item

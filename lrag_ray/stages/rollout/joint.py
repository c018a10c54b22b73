"""Rollouts of one backbone, method and length as the rows of the same passes.

A pass always has the same number of rows: one without a rollout of its own repeats another. So what a row computes
depends on neither the rollouts beside it nor their number, and a rollout may go on with others than it began with, bit
for bit, as long as it keeps its row (`wan.devices.row_kind`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lrag_ray.retrieval.similarity import HostCopy
from lrag_ray.rollout.loop import RolloutLoop
from lrag_ray.rollout.types import BlockResult
from lrag_ray.store.parts import FinishedBlock


def filled(rows: Sequence[int], size: int) -> list[int]:
    """Which rollout each of `size` rows computes, for rollouts whose own rows are `rows`."""
    return [rows.index(row) if row in rows else 0 for row in range(size)]


def placed(wanted: Sequence[int | None], size: int) -> list[int | None]:
    """A row for each rollout: the one that it began in, if that is free, or a free one.

    None where another has the row that it began in, or none is free.
    """
    found: list[int | None] = []
    for row in wanted:
        found.append(row if row not in found else None)
    free = [row for row in range(size) if row not in found]
    return [free.pop(0) if began is None and free else row for began, row in zip(wanted, found, strict=True)]


class JointRollout:
    """A loop over all rows, seen as the rollouts that have them."""

    def __init__(self, loop: RolloutLoop, rows: Sequence[int], size: int) -> None:
        """`rows` of the rollouts; `loop` computes what `filled` says."""
        self.loop = loop
        self._rows = rows
        self._filled = filled(rows, size)

    def replay(self, blocks: Sequence[FinishedBlock]) -> None:
        """Rebuild the caches from the next block of every rollout."""
        latents = torch.stack([blocks[i].latents for i in self._filled])
        self.loop.replay(latents, [[blocks[i].state for i in self._filled]])

    def expect(self, blocks: Sequence[FinishedBlock]) -> None:
        """What these, the blocks after the next ones, retrieve."""
        frames = {row.frame for block in blocks for row in block.trace if row.kind == "retrieved"}
        self.loop.expect(sorted(frames))

    def blocks(self, count: int, *, behind: bool = False) -> Iterator[list[FinishedBlock]]:
        """Generate `count` blocks of every rollout. With `behind`, one is read when the next has been launched, so
        that the device, whose times are known by then, never waits for the host."""
        waiting: list[list[_Reading]] = []
        for result in self.loop.blocks(count):
            waiting.append([_Reading(result, row) for row in self._rows])
            if len(waiting) > behind:
                yield [reading.finished() for reading in waiting.pop(0)]
        for last in waiting:
            yield [reading.finished() for reading in last]


class _Reading:
    """A row of a block on its way to host memory."""

    def __init__(self, result: BlockResult, row: int) -> None:
        self._block, self._trace = result.block, result.trace[row]
        self._latents = HostCopy(result.latents[row])
        self._state = {name: HostCopy(value) for name, value in result.state[row].items()}

    def finished(self) -> FinishedBlock:
        state = {name: copy.read() for name, copy in self._state.items()}
        return FinishedBlock(self._block, self._latents.read(), self._trace, state)

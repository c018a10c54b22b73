"""The history bank, its host memory, and similarities over it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrag_ray.context.policy import Layout, host_bank
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.retrieval.history import HistoryBank, Retrieved, TieredBank
from lrag_ray.retrieval.payload import FrameShape, make_payload
from lrag_ray.retrieval.similarity import DescriptorIndex, average_pool
from lrag_ray.retrieval.slabs import SlabPool
from tests.tiny import gathered, start, tiny_layout, tiny_transformer

CPU = torch.device("cpu")


class Locks:
    """Stands for page-locking, which needs a CUDA driver."""

    def __init__(self, room: int = 99) -> None:
        self.room = room
        self.locked: list[int] = []
        self.unlocked: list[int] = []
        self.pool = SlabPool(self.lock, lambda slab: self.unlocked.append(len(slab)))

    def lock(self, slab: Tensor) -> None:
        if len(self.locked) - len(self.unlocked) == self.room:
            raise MemoryError("no room")
        slab.fill_(7)
        self.locked.append(len(slab))


def test_a_bank_keeps_copies_of_what_is_overwritten() -> None:
    bank = TieredBank(CPU, make_payload("exact", FrameShape(3, 5, 2, 4), torch.bfloat16))
    rows = torch.randn(2, 3, 5, 2, 4, dtype=torch.bfloat16)
    kept = {}
    for frame in (1, 2, 9):
        rows = rows * 1.5
        kept[frame] = rows.clone()
        bank.append(frame, rows)
        rows.zero_()
        rows = kept[frame].clone()
    assert bank.nbytes() == 3 * rows.nbytes
    bank.prefetch([9, 1])
    assert torch.equal(gathered(bank, [9, 1], layers=3), torch.stack([kept[9], kept[1]]))


def test_rows_outlive_their_bank() -> None:
    bank = TieredBank(CPU, make_payload("exact", FrameShape(1, 4, 1, 2), torch.float32))
    bank.append(0, torch.full((2, 1, 4, 1, 2), 3.0))
    (rows,) = bank.gather([0]).layer(0)
    del bank
    gc.collect()
    assert torch.equal(rows, torch.full((1, 2, 4, 1, 2), 3.0))


def test_locked_slabs_are_made_ahead_and_used_again() -> None:
    locks = Locks()
    locks.pool.reserve(100, 3)
    assert locks.locked == [100, 100, 100]
    first = [locks.pool.take(100) for _ in range(3)]
    assert len({slab.data_ptr() for slab in first}) == 3
    assert all(slab.data_ptr() % 4096 == 0 for slab in first), "two slabs in one page cannot both be locked"
    assert len(locks.locked) == 3
    locks.pool.give_back(first)
    again = [locks.pool.take(100) for _ in range(4)]
    assert len(locks.locked) == 4
    assert {slab.data_ptr() for slab in first} < {slab.data_ptr() for slab in again}


def test_slabs_of_another_size_are_given_up() -> None:
    locks = Locks()
    locks.pool.give_back([locks.pool.take(100), locks.pool.take(100)])
    assert len(locks.pool.take(64)) == 64
    assert locks.unlocked == [100, 100]


def test_slabs_that_cannot_be_locked_stay_pageable_and_are_counted() -> None:
    locks = Locks(room=2)
    locks.pool.reserve(100, 3)
    assert (len(locks.locked), locks.pool.pageable, locks.pool.refusal) == (2, 1, "no room")
    slabs = [locks.pool.take(100) for _ in range(3)]
    assert len(locks.locked) == 2
    locks.pool.give_back(slabs)
    locks.pool.take(64)
    # What was never locked is not unlocked either: CUDA would keep the error for the next kernel.
    assert locks.unlocked == [100, 100]


class Watched(HistoryBank):
    """A bank that keeps what it was reported."""

    def __init__(self) -> None:
        self.inner = host_bank(tiny_layout())
        self.reserved: list[int] = []
        self.appended: list[int] = [0]

    def reserve(self, frames: int) -> None:
        self.reserved.append(frames)
        self.appended.append(0)

    def append(self, frame: int, rows: Tensor) -> None:
        self.appended[-1] += 1
        self.inner.append(frame, rows)

    def prefetch(self, frames: object) -> None:
        pass

    def gather(self, frames: object) -> Retrieved:
        return self.inner.gather(frames)  # type: ignore[arg-type]

    def nbytes(self) -> int:
        return self.inner.nbytes()


def always(bank: Watched) -> Callable[[Layout], Watched]:
    """A maker that hands out this bank."""
    return lambda layout: bank


def test_the_bank_is_told_ahead_of_exactly_what_the_next_block_evicts() -> None:
    for settings in (
        RagSettings(descriptor="avg_pool"),
        RagSettings(descriptor="avg_pool", admission="local"),
        RagSettings(descriptor="avg_pool", window=10, sink=4, top_k=2, recent_exclude=0),
        RagSettings(descriptor="avg_pool", window=-1),
    ):
        bank = Watched()
        rollout = start(tiny_transformer(), Rag, settings, make_bank=always(bank))
        for _ in rollout.blocks(9):
            pass
        assert bank.appended[0] == 0
        # The last block reserves for one that never comes.
        assert bank.reserved[:-1] == bank.appended[1:-1]
        assert bool(sum(bank.appended)) == (settings.window != -1)


def test_similarities_are_cosines_however_many_frames_there_are() -> None:
    index = DescriptorIndex(average_pool)
    latents = torch.randn(40, 16, 3, 4, generator=torch.Generator().manual_seed(0))
    descriptors = latents.mean(dim=(-2, -1)).double()
    for first in range(0, 40, 2):
        index.append(latents[first : first + 2])
        query = first + 1
        expected = torch.cosine_similarity(descriptors[query][None], descriptors[: query + 1])
        torch.testing.assert_close(index.similarities(query, 0, query + 1).double(), expected, rtol=0, atol=1e-6)
        assert len(index.similarities(query, 1, query)) == query
    assert len(index) == 40
    assert torch.equal(index.descriptors(), average_pool(latents))


class Written(TorchDispatchMode):
    """Counts the values that operations make, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not any(result.alias_info for result in func._schema.returns):
            self.values += made.numel()
        return made


def test_a_block_costs_the_same_however_long_the_rollout_is() -> None:
    """But for the similarities themselves, one per frame."""
    index = DescriptorIndex(average_pool)
    latents = torch.randn(2, 16, 3, 4)
    cost = {}
    for frames in range(2, 402, 2):
        with Written() as written:
            index.append(latents)
            similarities = index.similarities(frames - 1, 0, frames)
        cost[frames] = written.values - len(similarities)
    assert cost[400] == cost[100]

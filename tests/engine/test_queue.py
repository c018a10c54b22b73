from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lrag_ray.engine.queue import AFFINITY_SPAN, TaskQueue
from lrag_ray.stages.spec import Task


def task(key: str, order: int, group: str = "a", memory: int = 0) -> Task[None]:
    return Task(key, None, order, group, memory=memory)


def taken(queue: TaskQueue[None], memory: int = 0, held: str | None = None, **more: bool) -> str | None:
    found = queue.take(memory, held, Counter(), **more)
    return found.key if found else None


def test_items_come_in_order_interrupted_ones_first_and_what_raised_last() -> None:
    queue = TaskQueue([task("c", 2), task("a", 0), task("b", 1)])
    assert taken(queue) == "a"
    queue.put(task("raised", 0), "last")
    queue.put(task("interrupted", 7), "first")
    assert [taken(queue) for _ in range(5)] == ["interrupted", "b", "c", "raised", None]
    assert len(queue) == 0


def test_a_worker_stays_with_its_group_for_a_few_orders() -> None:
    queue = TaskQueue([task(f"{group}{order}", order, group) for order in range(9) for group in "ab"])
    assert [taken(queue, held="b") for _ in range(AFFINITY_SPAN + 2)] == ["b0", "b1", "b2", "b3", "b4", "a0"]


def test_of_two_new_groups_a_worker_takes_the_one_that_fewer_hold() -> None:
    queue = TaskQueue([task("a", 0, "a"), task("b", 0, "b")])
    found = queue.take(0, None, Counter({"a": 1}))
    assert found is not None and found.key == "b"


def test_a_worker_takes_only_what_it_has_memory_for_and_leaves_the_small_where_that_is_wanted() -> None:
    queue = TaskQueue([task("small", 0), task("large", 1, memory=5), task("huge", 2, memory=9)])
    assert queue.needs() == [9, 5, 0] and queue.example(9).key == "huge"
    assert taken(queue, memory=5, spare_small=True) == "large"
    assert [taken(queue, memory=5) for _ in range(2)] == ["small", None]
    assert queue.needs() == [9]


def test_what_is_taken_together_is_of_one_batch_in_order() -> None:
    kinds = [("rag", 0), ("base", 0), ("rag", 1), ("base", 1), ("rag", 2)]
    queue = TaskQueue([replace(task(f"{method}{order}", order), batch=method) for method, order in kinds])
    alone = task("alone", 0)
    queue.put(alone, "last")
    assert queue.turns(2) == 2 + 1 + 1 and queue.turns(1) == 6
    first = queue.take(0, None, Counter())
    assert first is not None and first.key == "rag0"
    assert [each.key for each in queue.take_beside(first, 1)] == ["rag1"]
    assert [taken(queue), taken(queue), taken(queue)] == ["base0", "base1", "rag2"]
    assert queue.take_beside(first, 3) == [] and len(queue) == 1
    assert queue.take(0, None, Counter()) == alone and queue.take_beside(alone, 3) == []

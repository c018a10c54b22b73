from __future__ import annotations

from collections import Counter

from lrag_ray.engine.queue import AFFINITY_SPAN, WaitingItems, WorkItem


def item(key: str, order: int, group: str = "a", memory: int = 0) -> WorkItem[None]:
    return WorkItem(key, order, group, None, memory=memory)


def taken(waiting: WaitingItems[None], memory: int = 0, held: str | None = None, **more: bool) -> str | None:
    found = waiting.take(memory, held, Counter(), **more)
    return found.key if found else None


def test_items_come_in_order_interrupted_ones_first_and_what_raised_last() -> None:
    waiting = WaitingItems([item("c", 2), item("a", 0), item("b", 1)])
    assert taken(waiting) == "a"
    waiting.put(item("raised", 0), "last")
    waiting.put(item("interrupted", 7), "first")
    assert [taken(waiting) for _ in range(5)] == ["interrupted", "b", "c", "raised", None]
    assert len(waiting) == 0


def test_a_worker_stays_with_its_group_for_a_few_orders() -> None:
    waiting = WaitingItems([item(f"{group}{order}", order, group) for order in range(9) for group in "ab"])
    assert [taken(waiting, held="b") for _ in range(AFFINITY_SPAN + 2)] == ["b0", "b1", "b2", "b3", "b4", "a0"]


def test_of_two_new_groups_a_worker_takes_the_one_that_fewer_hold() -> None:
    waiting = WaitingItems([item("a", 0, "a"), item("b", 0, "b")])
    found = waiting.take(0, None, Counter({"a": 1}))
    assert found is not None and found.key == "b"


def test_a_worker_takes_only_what_it_has_memory_for_and_leaves_the_small_where_that_is_wanted() -> None:
    waiting = WaitingItems([item("small", 0), item("large", 1, memory=5), item("huge", 2, memory=9)])
    assert waiting.needs() == [9, 5, 0] and waiting.example(9).key == "huge"
    assert taken(waiting, memory=5, spare_small=True) == "large"
    assert [taken(waiting, memory=5) for _ in range(2)] == ["small", None]
    assert waiting.needs() == [9]

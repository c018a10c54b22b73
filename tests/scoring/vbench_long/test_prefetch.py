from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lrag_ray.scoring.vbench_long.prefetch import prefetch


def test_the_next_item_is_made_while_the_last_is_used_and_no_more() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for index, event in enumerate(made):
            event.set()
            yield index

    working = prefetch(items())
    assert next(working) == 0
    assert made[1].wait(120)
    assert not made[2].wait(0.2)
    assert list(working) == [1, 2, 3]


def test_an_error_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("broken")

    working = prefetch(items())
    assert next(working) == 0
    with pytest.raises(ValueError, match="broken"):
        next(working)

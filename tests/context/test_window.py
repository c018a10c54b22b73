"""The KV cache: a fixed sink, a ring behind it, and rows that come back as they were written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrag_ray.context.policy import Layout
from lrag_ray.context.window import KVWindow

LAYERS, TOKENS, HEADS, HEAD_DIM = 2, 3, 2, 4
LAYOUT = Layout(LAYERS, HEADS, HEAD_DIM, (1, TOKENS), 2, torch.float32, torch.device("cpu"))


def rows(frame: int, layer: int, what: str) -> Tensor:
    """The keys or values [f, H, head_dim] of a frame in a layer: each value says where it belongs."""
    first = 1000 * frame + 100 * layer + (50 if what == "v" else 0)
    return torch.arange(first, first + TOKENS * HEADS * HEAD_DIM, dtype=torch.float32).view(TOKENS, HEADS, HEAD_DIM)


def fill(window: KVWindow, *frames: int) -> None:
    """Admit and write frames as a block does."""
    window.admit(list(frames))
    for layer in range(LAYERS):
        k, v = (torch.cat([rows(frame, layer, what) for frame in frames]) for what in "kv")
        window.write(layer, list(frames), k, v)


def read(window: KVWindow, layer: int, frames: list[int]) -> tuple[Tensor, Tensor]:
    spans = window.spans(layer, frames)
    return torch.cat([span.k.flatten(0, 1) for span in spans]), torch.cat([span.v.flatten(0, 1) for span in spans])


def assert_holds(window: KVWindow, frames: list[int]) -> None:
    assert window.frames == frames
    for layer in range(LAYERS):
        k, v = read(window, layer, frames)
        assert torch.equal(k, torch.cat([rows(frame, layer, "k") for frame in frames]))
        assert torch.equal(v, torch.cat([rows(frame, layer, "v") for frame in frames]))


def test_the_oldest_frames_behind_the_sink_leave_first() -> None:
    """Given room for 5 frames with a sink of 1, blocks of two push frames out in order, and frame 0 never."""
    window = KVWindow(LAYOUT, sink=1, capacity=5)
    fill(window, 0, 1)
    fill(window, 2, 3)
    assert window.drop_oldest(1) == [1]
    fill(window, 4, 5)
    assert_holds(window, [0, 2, 3, 4, 5])
    for block in range(3, 10):
        assert window.drop_oldest(2) == [2 * block - 4, 2 * block - 3]
        fill(window, 2 * block, 2 * block + 1)
        assert_holds(window, [0, *range(2 * block - 2, 2 * block + 2)])


def test_rows_of_a_dropped_frame_stay_until_the_next_block_is_written() -> None:
    """So the history bank may copy a frame after it was dropped: [K, V] over all layers."""
    window = KVWindow(LAYOUT, sink=0, capacity=2)
    fill(window, 0, 1)
    assert window.drop_oldest(2) == [0, 1]
    kept = window.rows(1)
    assert kept.shape == (2, LAYERS, TOKENS, HEADS, HEAD_DIM)
    for layer in range(LAYERS):
        assert torch.equal(kept[0, layer], rows(1, layer, "k"))
        assert torch.equal(kept[1, layer], rows(1, layer, "v"))
    assert window.frame_bytes == kept.numel() * 4


def test_frames_come_in_the_order_that_is_asked_for_and_neighbours_as_one_span() -> None:
    """Given a ring in which frames 4 and 5 took the slots of 1 and 2, they are neighbours, and 3 lies behind them."""
    window = KVWindow(LAYOUT, sink=1, capacity=4)
    fill(window, 0, 1, 2, 3)
    window.drop_oldest(2)
    fill(window, 4, 5)
    spans = window.spans(0, [3, 4, 5])
    assert [span.rows for span in spans] == [TOKENS, 2 * TOKENS]
    stored = window.rows(3).untyped_storage().data_ptr()
    assert {x.untyped_storage().data_ptr() for span in spans for x in span} == {stored}, "views, not copies"
    for asked in ([5, 3], [0, 5], [4], [3, 4, 5, 0]):
        k, _ = read(window, 1, asked)
        assert torch.equal(k, torch.cat([rows(frame, 1, "k") for frame in asked]))
    assert window.spans(0, []) == []


def test_without_a_capacity_every_frame_is_kept() -> None:
    """Given more frames than the first allocation holds, none is lost when it grows."""
    window = KVWindow(LAYOUT, sink=1, capacity=None)
    for block in range(30):
        fill(window, 2 * block, 2 * block + 1)
    assert_holds(window, list(range(60)))


def test_a_sink_longer_than_what_is_cached_is_not_dropped() -> None:
    window = KVWindow(LAYOUT, sink=3, capacity=5)
    fill(window, 0, 1)
    assert window.drop_oldest(0) == window.drop_oldest(-2) == []
    with pytest.raises(ValueError, match="cannot drop 1 frames behind a sink of 3: 2 are cached"):
        window.drop_oldest(1)
    fill(window, 2, 3)
    assert window.drop_oldest(1) == [3]
    assert_holds(window, [0, 1, 2])


def test_a_block_without_room_is_refused() -> None:
    window = KVWindow(LAYOUT, sink=1, capacity=3)
    fill(window, 0, 1)
    with pytest.raises(ValueError, match="4 frames in a cache of 3: drop the oldest first"):
        window.admit([2, 3])

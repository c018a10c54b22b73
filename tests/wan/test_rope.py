"""RoPE against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from lrag_ray.wan.rope import Rope, rotate


@pytest.mark.parametrize("head_dim", [24, 32, 128])
def test_rotation_turns_each_pair_by_index_times_frequency(head_dim: int) -> None:
    rows, columns, index = 2, 3, [5, 0, 900]
    x = torch.randn(len(index) * rows * columns, 2, head_dim)
    turned = rotate(x, Rope(head_dim, (rows, columns), torch.device("cpu")).frames(index))
    pairs = head_dim // 2
    spatial = pairs // 3
    widths = [pairs - 2 * spatial, spatial, spatial]
    for token in range(len(x)):
        frame, position = divmod(token, rows * columns)
        indices = (index[frame], *divmod(position, columns))
        angle = torch.cat(
            [i * 10000.0 ** (-torch.arange(w, dtype=torch.float64) / w) for i, w in zip(indices, widths, strict=True)]
        )
        z = torch.view_as_complex(x[token].double().unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones(pairs).double(), angle
        )
        assert torch.allclose(turned[token].double(), torch.view_as_real(z).flatten(-2), atol=1e-5)


def test_only_index_differences_matter_for_attention() -> None:
    rope = Rope(24, (2, 2), torch.device("cpu"))
    q, k = torch.randn(4, 1, 24), torch.randn(4, 1, 24)
    near = (rotate(q, rope.frames([9])) * rotate(k, rope.frames([4]))).sum()
    far = (rotate(q, rope.frames([905])) * rotate(k, rope.frames([900]))).sum()
    assert torch.allclose(near, far, atol=1e-3)


def test_negative_indices_turn_back() -> None:
    rope = Rope(24, (1, 1), torch.device("cpu"))
    x, origin = torch.randn(1, 1, 24), torch.zeros(1, dtype=torch.long)
    there = rotate(x, rope.tokens(torch.tensor([7]), origin))
    assert torch.allclose(rotate(there, rope.tokens(torch.tensor([-7]), origin)), x, atol=1e-5)


def test_indices_outside_the_released_table_are_refused() -> None:
    with pytest.raises(IndexError, match=r"1024 lies outside the table of rotations, 0\.\.1023"):
        Rope(24, (1, 1), torch.device("cpu")).frames([1024])


def test_bfloat16_is_rotated_in_float32() -> None:
    rope = Rope(24, (2, 2), torch.device("cpu"))
    x = torch.randn(4, 2, 24).bfloat16()
    assert torch.equal(rotate(x, rope.frames([11])), rotate(x.float(), rope.frames([11])).bfloat16())

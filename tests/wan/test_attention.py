"""Attention with numbers that can be checked by hand."""

from __future__ import annotations

import math

import torch

from lrag_ray.wan.attention import attention


def test_scores_are_scaled_by_the_root_of_the_head_width_and_weigh_the_values() -> None:
    """Given head_dim 4 and q·k of 2·ln 3 and 0, the scores are ln 3 and 0, so the weights are 3/4 and 1/4."""
    q = torch.tensor([2.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    k = torch.tensor([[math.log(3), 5.0, 5.0, 5.0], [0.0, -5.0, 7.0, 1.0]]).view(1, 2, 1, 4)
    v = torch.tensor([[8.0, 0.0, 4.0, -4.0], [4.0, 4.0, 4.0, 4.0]]).view(1, 2, 1, 4)
    torch.testing.assert_close(attention(q, k, v).flatten(), torch.tensor([7.0, 1.0, 4.0, -2.0]))


def test_every_query_sees_every_key() -> None:
    """Given equal scores, each of three queries gets the mean of all five values: nothing is masked."""
    q, k = torch.randn(1, 3, 1, 2), torch.zeros(1, 5, 1, 2)
    v = torch.arange(10.0).view(1, 5, 1, 2)
    torch.testing.assert_close(attention(q, k, v), torch.tensor([4.0, 5.0]).expand(1, 3, 1, 2))


def test_heads_and_batch_elements_do_not_mix() -> None:
    """Given scores that are decisive, head h of element b takes the value that its own key points to."""
    q = torch.full((2, 1, 2, 1), 100.0)
    k = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]).unsqueeze(-1)
    v = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]).unsqueeze(-1)
    assert attention(q, k, v).flatten().tolist() == [1.0, 4.0, 7.0, 6.0]

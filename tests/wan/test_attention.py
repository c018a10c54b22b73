"""Attention with numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lrag_ray.wan.attention import attention, backend_of
from lrag_ray.wan.devices import generator_kind, row_kind, row_of, same_kind, without_row
from lrag_ray.wan.kernels import Kernels


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chosen_kernel_computes_what_torch_chooses_on_the_cpu(dtype: torch.dtype) -> None:
    """Bit for bit, in the strides that a context buffer has."""
    for batch, head_dim, queries, keys in ((1, 128, 18, 72), (2, 12, 7, 13), (1, 64, 300, 1000)):
        q = torch.randn(batch, queries, 3, head_dim, dtype=dtype)
        k, v = torch.randn(2, batch, keys + 9, 3, head_dim, dtype=dtype)[:, :, :keys]
        q_heads, k_heads, v_heads = (x.transpose(1, 2) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(q_heads, k_heads, v_heads).transpose(1, 2)
        found = attention(q, k, v)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_a_chosen_kernel_is_called_and_recorded() -> None:
    q, k = torch.randn(1, 40, 2, 16), torch.randn(1, 90, 2, 16)
    cpu = torch.device("cpu")
    by_flash, kind = attention(q, k, k), generator_kind(Kernels(), cpu, torch.float32, 16)
    by_math, other = attention(q, k, k, "math"), generator_kind(Kernels("math"), cpu, torch.float32, 16)
    torch.testing.assert_close(by_math, by_flash)
    assert not torch.equal(by_math, by_flash), "each rounds in its own way"
    assert kind == f"cpu, torch {torch.__version__}, flash attention"
    assert other == f"cpu, torch {torch.__version__}, math attention"
    with pytest.raises(ValueError, match=r"cudnn attention runs on GPUs alone.*attention: auto"):
        backend_of("cudnn", cpu, torch.float32, 16)


@pytest.mark.parametrize(
    ("recorded", "same"),
    [
        ("H100, torch 2.12.1, cuDNN 91900, flash attention", True),
        ("H100, torch 2.12.1, cuDNN 91900", True),
        ("H100", True),
        ("H100, torch 2.12.1, cuDNN 91900, efficient attention", False),
        ("H100, torch 2.12.1, cuDNN 92000, flash attention", False),
        ("H100, torch 2.12.1, cuDNN 9190", False),
        ("H100, torch 2.12", False),
        ("H1", False),
        ("H100, torch 2.12.1, cuDNN 91900, flash attention, 2 prompts per pass, row 0", False),
    ],
)
def test_a_kind_of_an_older_version_says_less_but_nothing_else(recorded: str, same: bool) -> None:
    assert same_kind(recorded, "H100, torch 2.12.1, cuDNN 91900, flash attention") == same


def test_fused_kernels_are_kinds_of_their_own_whichever_way_they_are_switched() -> None:
    """No version that leaves them out of a kind has used them."""
    plain = "H100, torch 2.12.1, cuDNN 91900, flash attention"
    rows, layers = f"{plain}, fused rows 1", f"{plain}, fused layers 1"
    kinds = [plain, rows, layers, f"{rows}, fused layers 1", row_kind(rows, 0, 2), row_kind(plain, 0, 2)]
    assert all(same_kind(a, b) == (a == b) for a in kinds for b in kinds)
    assert not same_kind("H100", rows) and same_kind("H100, fused rows 1", rows)


def test_rows_of_a_pass_are_kinds_of_their_own_and_take_equally_long() -> None:
    alone = "H100, torch 2.12.1, cuDNN 91900, flash attention"
    first, second = row_kind(alone, 0, 2), row_kind(alone, 1, 2)
    assert row_kind(alone, 0, 1) == alone
    assert same_kind(first, first) and same_kind("H100, 2 prompts per pass, row 0", first)
    assert not any(same_kind(old, first) for old in (second, row_kind(alone, 0, 3), alone, "H100"))
    assert [row_of(second, 2), row_of(second, 3), row_of(alone, 2)] == [1, 0, 0]
    assert without_row(first) == without_row(second) == f"{alone}, 2 prompts per pass"
    assert without_row(alone) == alone

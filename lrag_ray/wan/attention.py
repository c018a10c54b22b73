"""Attention as a pure function of tensors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q·kᵀ / sqrt(head_dim))·v without a mask.

    q [B, queries, heads, head_dim]; k and v [B, keys, heads, head_dim]; returns the shape of q.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)

"""The Muon optimizer in float32.

torch.optim.Muon orthogonalises in bfloat16, which many CPUs emulate: there a step of the tiny generator takes longer
than its gradients. Otherwise, and without weight decay, it is the same optimizer (tests/world/test_training.py).
Matrices of one shape are orthogonalised together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon:
    """Nesterov momentum whose matrices are replaced by the nearest orthogonal ones (Jordan et al., 2024).

    A kernel of a convolution [out, in, …] is a matrix with a row for each output.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            groups[matrix.shape].append(matrix)
        self._groups = list(groups.values())
        self._momentum = momentum
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        """Momenta, one stack for each shape."""

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Follow the gradients, which every matrix must have."""
        for group, buffer in zip(self._groups, self.buffers, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            buffer.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp(buffer, self._momentum).flatten(2))
            rows, columns = update.shape[1:]
            scale = max(1, rows / columns) ** 0.5
            for matrix, each in zip(group, update, strict=True):
                matrix.add_(each.view_as(matrix), alpha=-lr * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix of each of [n, rows, columns], by a Newton-Schulz iteration."""
    a, b, c = _POLYNOMIAL
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result

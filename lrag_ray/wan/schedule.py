"""The flow-matching schedule of the distilled generators (Self-Forcing and its descendants).

sigma(u) = shift·u / (1 + (shift - 1)·u) with u from 1 down to 0 in 1001 points, the last one dropped, and
timestep = 1000·sigma. A noisy sample is x_t = (1 - sigma)·x0 + sigma·noise and the network predicts the flow
noise - x0. A timestep stands for the nearest entry of the table, so t = 0 uses the last sigma, not 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000


class FlowMatchSchedule:
    """Tables [1000] in float32 on the CPU, highest noise first. The table is computed in float32, as released."""

    def __init__(self, shift: float) -> None:
        u = torch.linspace(1.0, 0.0, TRAIN_TIMESTEPS + 1)[:-1]
        self.shift = shift
        self.sigmas = shift * u / (1 + (shift - 1) * u)
        self.timesteps = self.sigmas * TRAIN_TIMESTEPS
        bell = torch.exp(-2 * ((self.timesteps - TRAIN_TIMESTEPS / 2) / TRAIN_TIMESTEPS) ** 2)
        bell = bell - bell.min()
        self.training_weights = bell * (TRAIN_TIMESTEPS / bell.sum())

    def warp(self, steps: Sequence[int]) -> list[float]:
        """Replace each entry d of a step list by the timestep number 1000 - d; d = 0 becomes 0."""
        table = torch.cat([self.timesteps, torch.zeros(1)])
        return [float(table[TRAIN_TIMESTEPS - step]) for step in steps]

    def timestep_index(self, t: Tensor) -> Tensor:
        """Index of the nearest table entry for each timestep of t [m]; the first one on a tie."""
        return (self.timesteps[None] - t.float().cpu()[:, None]).abs().argmin(dim=1)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of each timestep of t [m], float32 on the CPU."""
        return self.sigmas[self.timestep_index(t)]

    def training_weight(self, t: Tensor) -> Tensor:
        """Loss weight of each timestep of t [m]."""
        return self.training_weights[self.timestep_index(t)]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of samples x0 [m, ...] at timesteps t [m]."""
        return add_noise(x0, noise, self._sigma_like(x0, t))

    def x0_from_flow(self, flow: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Clean samples [m, ...] from the predicted flow at timesteps t [m]."""
        return x0_from_flow(flow, x_t, self._sigma_like(flow, t))

    def flow_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Flow [m, ...] that leads from x0 to x_t at timesteps t [m]; computed in float64."""
        sigma = self._sigma_like(x0, t).double()
        return ((x_t.double() - x0.double()) / sigma).to(x0.dtype)

    def _sigma_like(self, x: Tensor, t: Tensor) -> Tensor:
        return self.sigma(t).to(x.device).view(-1, *([1] * (x.dim() - 1)))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma)·x0 + sigma·noise in float32, back to x0's dtype; sigma broadcasts (a CPU scalar never syncs)."""
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)


def x0_from_flow(flow: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """x_t - sigma·flow in float64, back to the flow's dtype."""
    return (x_t.double() - sigma.double() * flow.double()).to(flow.dtype)

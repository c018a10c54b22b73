"""Optical flow with RAFT, the flow of the last iteration only.

The network and its weights are VBench's; this loop computes the same numbers with less work. Of a run of frames every
frame is encoded once, though it is in two pairs; what the GRU's convolutions make of the context features, which do
not change, is computed once and not in each iteration; the gates that see the same input are one convolution; and
the upsampling mask, which VBench's loop makes in every iteration, is made once. (Teed and Deng 2020.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrag_ray.scoring.vbench_long.correlation import MIN_POSITIONS, Correlation, pixel_grid

ITERATIONS = 20
STRIDE = 8
"""Of the feature maps; frames must be padded to multiples of it."""
RADIUS = 4
HIDDEN = 128
MIN_SIDE = STRIDE * MIN_POSITIONS
"""Pixels of the shorter padded side."""


class _Gates(NamedTuple):
    """One direction of the separable GRU, its kernels sorted by what they read."""

    hidden_motion_zr: Tensor
    """[256, 256, kh, kw]: update and reset gate from hidden state and motion."""
    hidden_motion_q: Tensor
    """[128, 256, kh, kw]: candidate from (reset) hidden state and motion."""
    context: Tensor
    """[384, 128, kh, kw]: all three from the context."""
    bias: Tensor
    """[384]."""
    padding: tuple[int, int]


class FlowEstimator:
    """Batched RAFT over consecutive frames."""

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        """VBench's own module."""
        update: Any = network.update_block
        self._gates = [_gates(update.gru, direction) for direction in ("1", "2")]

    def flows(self, frames: Tensor, pairs_per_batch: int) -> Iterator[Tensor]:
        """Flows [n, 2, H, W] in pixels from each frame to the next, in batches of at most `pairs_per_batch`.

        `frames` are 0..255 [T, 3, H, W], H and W multiples of 8. The consumer may stop early.
        """
        frames = frames if frames.is_floating_point() else frames.float()
        images = 2 * (frames / 255) - 1
        last = None
        for start in range(0, len(images) - 1, pairs_per_batch):
            batch = images[start : start + pairs_per_batch + 1]
            features = self.network.fnet(batch if last is None else batch[1:]).float()
            if last is not None:
                features = torch.cat([last, features])
            last = features[-1:]
            yield self._flow(features[:-1], features[1:], self.network.cnet(batch[:-1]))

    def _flow(self, first: Tensor, second: Tensor, context: Tensor) -> Tensor:
        update = self.network.update_block
        correlation = Correlation(first, second, RADIUS)
        hidden, context = context.split(HIDDEN, dim=1)
        hidden, context = torch.tanh(hidden), torch.relu(context)
        static = [F.conv2d(context, gate.context, gate.bias, padding=gate.padding) for gate in self._gates]
        origin = pixel_grid(first)
        where = origin
        for _ in range(ITERATIONS):
            motion = update.encoder(where - origin, correlation.around(where))
            for gate, fixed in zip(self._gates, static, strict=True):
                hidden = _gru_step(gate, fixed, hidden, motion)
            where = where + update.flow_head(hidden)
        upsampled: Tensor = self.network.upsample_flow(where - origin, 0.25 * update.mask(hidden))
        return upsampled


def _gates(gru: Any, direction: str) -> _Gates:
    z, r, q = (getattr(gru, f"conv{gate}{direction}") for gate in "zrq")

    def split(weight: Tensor) -> tuple[Tensor, Tensor]:
        hidden, context, motion = weight.detach().split(HIDDEN, dim=1)
        return torch.cat([hidden, motion], dim=1), context

    (moving_z, fixed_z), (moving_r, fixed_r), (moving_q, fixed_q) = (split(conv.weight) for conv in (z, r, q))
    return _Gates(
        torch.cat([moving_z, moving_r]).contiguous(),
        moving_q.contiguous(),
        torch.cat([fixed_z, fixed_r, fixed_q]).contiguous(),
        torch.cat([conv.bias.detach() for conv in (z, r, q)]),
        z.padding,
    )


def _gru_step(gate: _Gates, fixed: Tensor, hidden: Tensor, motion: Tensor) -> Tensor:
    fixed_zr, fixed_q = fixed.split([2 * HIDDEN, HIDDEN], dim=1)
    seen = torch.cat([hidden, motion], dim=1)
    zr = torch.sigmoid(F.conv2d(seen, gate.hidden_motion_zr, padding=gate.padding) + fixed_zr)
    z, r = zr.split(HIDDEN, dim=1)
    seen = torch.cat([r * hidden, motion], dim=1)
    q = torch.tanh(F.conv2d(seen, gate.hidden_motion_q, padding=gate.padding) + fixed_q)
    updated: Tensor = (1 - z) * hidden + z * q
    return updated

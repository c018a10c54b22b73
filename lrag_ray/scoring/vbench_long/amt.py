"""The frame half-way between two frames with AMT-S.

The network and its weights are VBench's; this is its forward pass with less work around the convolutions. VBench's
makes the sampling grids of all its warps on the host and copies them to the device, copies the correlation volume to
transpose it and pools it through a copy in another layout, and holds both images once per flow. (Li et al. 2023.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrag_ray.scoring.vbench_long.correlation import Correlation, pixel_grid

RADIUS = 3
FLOWS = 3
"""Pairs of flows whose warped images are mixed."""


class FrameInterpolator:
    """Batched AMT-S."""

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        """VBench's own module."""

    def middle(self, before: Tensor, after: Tensor) -> Tensor:
        """0..1 frames [B, 3, H, W] half-way between 0..1 frames; H and W multiples of 16, both at least 64."""
        network = self.network
        mean = (before.mean(dim=(1, 2, 3), keepdim=True) + after.mean(dim=(1, 2, 3), keepdim=True)) / 2
        images = torch.cat([before - mean, after - mean])
        first, second = network.feat_encoder(images).chunk(2)
        there, back = Correlation(first, second, RADIUS), Correlation(second, first, RADIUS)
        origin = pixel_grid(first)
        maps = [level.chunk(2) for level in network.encoder(images)]

        coarsest = maps[3][0]
        halfway = coarsest.new_full((len(coarsest), 1, *coarsest.shape[2:]), 0.5)
        made = network.decoder4.convblock(torch.cat([*maps[3], halfway], dim=1))
        flows, hidden = made[:, :4], made[:, 4:]
        for level, update, decoder in (
            (2, network.update4, network.decoder3),
            (1, network.update3, network.decoder2),
            (0, network.update2, network.decoder1),
        ):
            shrink = 0.5 ** (2 - level)
            seen = flows if shrink == 1 else shrink * _resize(flows, shrink)
            # The middle is as far from one frame as from the other: twice its flows lead from frame to frame.
            to_before, to_after = seen.chunk(2, dim=1)
            alike = torch.cat([there.around(origin + 2 * to_after), back.around(origin + 2 * to_before)], dim=1)
            more_hidden, more_flow = update(hidden, seen, alike)
            hidden, flows = hidden + more_hidden, flows + more_flow
            made = decoder.convblock(torch.cat([hidden, *_warped(maps[level], flows), flows], dim=1))
            finer = 2 * _resize(flows, 2)
            if level:
                flows, hidden = made[:, :4] + finer, made[:, 4:]
        return _mixed(network.comb_block, images.chunk(2), made, finer, mean)


def _mixed(combine: nn.Module, images: tuple[Tensor, ...], made: Tensor, flows: Tensor, mean: Tensor) -> Tensor:
    """The image from the last decoder's output: flows, masks and rests of several guesses."""
    more_flow, mask, rest = made.split([4 * FLOWS, FLOWS, 3 * FLOWS], dim=1)
    mask = torch.sigmoid(mask)
    # Per direction, then per guess, (x, y).
    by_guess = more_flow.unflatten(1, (2, FLOWS, 2)) + flows.unflatten(1, (2, 1, 2))
    guesses = []
    for guess in range(FLOWS):
        first, second = _warped(images, by_guess[:, :, guess].flatten(1, 2))
        mixed = torch.lerp(second, first, mask[:, guess : guess + 1])
        guesses.append(mixed + mean + rest[:, 3 * guess : 3 * guess + 3])
    mixed = torch.cat(guesses, dim=1)
    middle: Tensor = mixed.unflatten(1, (FLOWS, 3)).mean(dim=1) + combine(mixed)
    return middle.clamp(0, 1)


def _warped(maps: tuple[Tensor, ...], flows: Tensor) -> tuple[Tensor, ...]:
    """Two maps [B, C, h, w], each drawn along its flow (x, y) of `flows` [B, 4, h, w]; the border continues."""
    height, width = flows.shape[2:]
    x = torch.linspace(-1, 1, width, device=flows.device)
    y = torch.linspace(-1, 1, height, device=flows.device)
    drawn = []
    for image, flow in zip(maps, flows.chunk(2, dim=1), strict=True):
        points = torch.stack([x + flow[:, 0] * (2 / (width - 1)), y[:, None] + flow[:, 1] * (2 / (height - 1))], dim=-1)
        drawn.append(F.grid_sample(image, points, mode="bilinear", padding_mode="border", align_corners=True))
    return tuple(drawn)


def _resize(images: Tensor, scale: float) -> Tensor:
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)

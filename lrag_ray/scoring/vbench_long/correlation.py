"""How alike every position of one feature map is to every position of another, at several scales.

RAFT and AMT-S look up windows of this volume again and again. (Teed and Deng 2020.)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 4
"""Scales, in both networks; each halves the sides of the one before."""
MIN_POSITIONS = 2**LEVELS
"""Shortest side of a feature map. Below it the coarsest scale has a side of one position, hence no extent: the official
code divides by it, and then all numbers of the network are NaN."""

_STRIDE = 8
"""Of the feature maps, in pixels."""
_MOST_POSITIONS = 65_535
"""Each position of a pair is an image to cuDNN's sampler, which refuses more than these at once."""


def pairs_at_once(wanted: int, height: int, width: int) -> int:
    """As many of the `wanted` pairs of padded frames as one lookup on a GPU can take, at least one."""
    return max(1, min(wanted, _MOST_POSITIONS // (height // _STRIDE * (width // _STRIDE))))


class Correlation:
    """All-pairs correlation of feature maps [B, C, h, w], looked up in windows of (2 radius + 1)² positions."""

    def __init__(self, first: Tensor, second: Tensor, radius: int) -> None:
        rows = (first / math.sqrt(first.shape[1])).flatten(2).transpose(1, 2)
        self._levels = []
        for level in range(LEVELS):
            if level:
                # The same as to pool the volume, the largest tensor of either network, which then is written once.
                second = F.avg_pool2d(second, 2, stride=2)
            volume = rows @ second.flatten(2)
            self._levels.append(volume.view(-1, 1, *second.shape[2:]))
        steps = torch.arange(-radius, radius + 1, device=first.device, dtype=torch.float32)
        # The window's rows run along x.
        window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
        self._to_unit = [_per_pixel(level) for level in self._levels]
        self._windows = [window * each - 1 for each in self._to_unit]

    def around(self, where: Tensor) -> Tensor:
        """Correlations [B, levels·(2 radius + 1)², h, w] around `where` (x, y) [B, 2, h, w], in pixels of `second`."""
        batch, _, height, width = where.shape
        centres = where.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
        found = []
        for index, (level, window, each) in enumerate(zip(self._levels, self._windows, self._to_unit, strict=True)):
            # From pixels to the -1..1 of grid_sample.
            points = torch.addcmul(window, centres, each, value=0.5**index)
            sampled = F.grid_sample(level, points, mode="bilinear", padding_mode="zeros", align_corners=True)
            found.append(sampled.view(batch, height, width, -1))
        return torch.cat(found, dim=-1).permute(0, 3, 1, 2).contiguous()


def pixel_grid(features: Tensor) -> Tensor:
    """Pixel coordinates (x, y) [B, 2, h, w] of feature maps [B, C, h, w]."""
    height, width = features.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=features.device, dtype=torch.float32),
        torch.arange(width, device=features.device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([x, y])[None].expand(len(features), -1, -1, -1)


def _per_pixel(level: Tensor) -> Tensor:
    """What a pixel (x, y) [2] is of the -1..1 of a level. Filled on the device: a copy from the host would wait."""
    sides = [torch.full((), length - 1.0, device=level.device) for length in (level.shape[3], level.shape[2])]
    return 2 / torch.stack(sides)

"""The latents of the world: a linear code of its pictures.

A latent cell is what 16 principal components keep of a patch of 16 x 16 pixels in the last video frame of its four,
each with unit variance. So the latents of any pose are known without a VAE: the generator is trained on them, and the
VAE's encoder learns to make them while its decoder learns to undo them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lrag_ray.world.scenes import RING, TURN, VIEW, Pixels, Scene, background_of_every_hue, make_scene

CELL = 16
"""Pixels of a latent cell, each way."""
CHANNELS = 16
CELLS = VIEW // CELL
"""Latent cells of a frame, each way (8)."""
_PER_FRAME = RING // TURN // CELL
"""Cells that the view moves per latent frame."""


@dataclass(frozen=True)
class LinearCode:
    """Patch · weight + bias, and an inverse in the sense of least squares."""

    weight: Tensor
    """[768, 16] from a patch's values in [-1, 1], ordered row, column, colour."""
    bias: Tensor
    """[16]."""

    def of_ring(self, ring: Pixels) -> Tensor:
        """Codes [96, 16, 8] of a panorama [128, 1536, 3]: column of cells, channel, row of cells."""
        return (_patches(ring) @ self.weight + self.bias).permute(0, 2, 1).contiguous()

    def of_scene(self, scene: Scene, frames: Sequence[int], ring: Pixels | None = None) -> Tensor:
        """Latents [F, 16, 8, 8] of the ride's latent frames with these numbers, along the scene's ring or another."""
        codes = self.of_ring(scene.ring if ring is None else ring)
        first = torch.tensor([(scene.setting.pose + frame) % TURN * _PER_FRAME for frame in frames])
        columns = (first[:, None] + torch.arange(CELLS)) % len(codes)
        return codes[columns].permute(0, 2, 3, 1).contiguous()


def fit_code(seed: int, scenes: int = 64) -> LinearCode:
    """Principal components of the patches of `scenes` panoramas with walls of every hue."""
    drawn = [make_scene("code", seed, i) for i in range(scenes)]
    rings = [scene.ring_before(background_of_every_hue(scene.setting)) for scene in drawn]
    patches = torch.cat([_patches(ring).flatten(0, 1) for ring in rings]).double()
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    best = vectors[:, -CHANNELS:].flip(1)
    # Either sign is a principal component: the one whose largest entry is positive.
    best = best * torch.sign(best.gather(0, best.abs().argmax(dim=0, keepdim=True)))
    weight = best / values[-CHANNELS:].flip(0).sqrt()
    return LinearCode(weight.float(), (-mean @ weight).float())


def _patches(ring: Pixels) -> Tensor:
    """[96, 8, 768] values in [-1, 1]: column of cells, row of cells, pixels of the cell."""
    scaled = torch.from_numpy(np.ascontiguousarray(ring)).float() / 127.5 - 1
    cells = scaled.view(CELLS, CELL, RING // CELL, CELL, 3)
    return cells.permute(2, 0, 1, 3, 4).reshape(RING // CELL, CELLS, -1)

"""Optical flow against known shifts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lrag_ray.scoring.flow import optical_flow


@pytest.fixture(scope="module")
def texture() -> Tensor:
    noise = torch.rand(1, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=(192, 256), mode="bicubic").clamp(0, 1)[0, 0]


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, -1), (3, 2), (-6, 4)])
def test_shift_is_found(texture: Tensor, dx: int, dy: int) -> None:
    one = texture[50:130, 60:180][None]
    # What is at p in the first frame is at p + (dx, dy) in the second.
    two = texture[50 - dy : 130 - dy, 60 - dx : 180 - dx][None]
    inner = optical_flow(one, two)[0, :, 12:-12, 12:-12]
    assert inner.mean((1, 2)).tolist() == pytest.approx([dx, dy], abs=0.1)
    assert (inner - torch.tensor([dx, dy]).view(2, 1, 1)).norm(dim=0).median() < 0.1


def test_fraction_of_a_pixel_is_found(texture: Tensor) -> None:
    two = (texture[50:130, 60:180] + texture[50:130, 59:179]) / 2
    inner = optical_flow(texture[50:130, 60:180][None], two[None])[0, :, 12:-12, 12:-12]
    assert inner.mean((1, 2)).tolist() == pytest.approx([0.5, 0], abs=0.05)


def test_flat_frames_do_not_move() -> None:
    grey = torch.full((2, 40, 60), 0.5)
    noise = torch.rand(2, 40, 60, generator=torch.Generator().manual_seed(1)) / 255
    assert optical_flow(grey, grey + noise).norm(dim=1).mean() < 0.05


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (13, 64)])
def test_small_frames_are_borne(size: tuple[int, int]) -> None:
    flow = optical_flow(torch.rand(1, *size), torch.rand(1, *size))
    assert flow.shape == (1, 2, *size)
    assert math.isfinite(flow.sum().item())


def test_pairs_do_not_touch_each_other(texture: Tensor) -> None:
    one, two = texture[None, :64, :64], texture[None, 1:65, 2:66]
    alone = optical_flow(one, two)
    together = optical_flow(torch.cat([two, one]), torch.cat([one, two]))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)

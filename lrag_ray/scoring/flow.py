"""Dense optical flow without a network: pyramidal Lucas-Kanade, batched over frame pairs.

B. D. Lucas and T. Kanade, "An iterative image registration technique with an application to stereo vision", 1981;
pyramid after J.-Y. Bouguet, 1999. Flat regions carry no evidence of motion: a small regulariser leaves their flow at
what the coarser level says, and at zero if no level knows better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])
"""BT.709 weights of R, G and B."""
_LONG_SIDE = 128
_WINDOW = 5
"""Side of the box that is applied twice (a tent of 9 px)."""
_STEPS_PER_LEVEL = 3
_SMALLEST_SIDE = 12
_REGULARISER = 1e-4
"""Added to the structure tensor; about the gradient energy of 8-bit rounding noise on luma in [0, 1]."""


def luma_of(rgb: Tensor) -> Tensor:
    """BT.709 luma [H, W] of RGB [H, W, 3]."""
    return rgb @ LUMA


def reduced(luma: Tensor) -> Tensor:
    """Luma [H, W] with its longer side at most 128 px, averaged over areas."""
    scale = min(1.0, _LONG_SIDE / max(luma.shape))
    height, width = (max(1, round(side * scale)) for side in luma.shape)
    return F.interpolate(luma[None, None], size=(height, width), mode="area")[0, 0]


@torch.inference_mode()
def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Flow [N, 2, H, W] in pixels (x, y): what is at p in `first` is at p + flow(p) in `second`.

    `first` and `second` are luma [N, H, W] in [0, 1].
    """
    pyramid = [(first[:, None], second[:, None])]
    while min(pyramid[-1][0].shape[-2:]) // 2 >= _SMALLEST_SIDE:
        coarse = tuple(F.avg_pool2d(image, 2) for image in pyramid[-1])
        pyramid.append((coarse[0], coarse[1]))
    flow = torch.zeros_like(pyramid[-1][0]).repeat(1, 2, 1, 1)
    for one, two in reversed(pyramid):
        flow = _resized(flow, one)
        gradient = _gradient(one)
        gx, gy = gradient[:, :1], gradient[:, 1:]
        # Structure tensor of the window; its inverse maps a brightness error to a shift.
        xx, xy, yy = _window(gx * gx) + _REGULARISER, _window(gx * gy), _window(gy * gy) + _REGULARISER
        determinant = xx * yy - xy * xy
        for _ in range(_STEPS_PER_LEVEL):
            error = one - _warped(two, flow)
            ex, ey = _window(gx * error), _window(gy * error)
            step = torch.cat([yy * ex - xy * ey, xx * ey - xy * ex], dim=1) / determinant
            # The linearisation holds for about a pixel; larger motion is the coarser levels' business.
            flow = flow + step.clamp(-1, 1)
    return flow


def _gradient(image: Tensor) -> Tensor:
    """Central differences (x, y) [N, 2, H, W] of [N, 1, H, W]."""
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    gx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    gy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.cat([gx, gy], dim=1)


def _window(values: Tensor) -> Tensor:
    # Applied twice: a single box has negative lobes in its spectrum, and the dense iteration diverges at those.
    for _ in range(2):
        values = F.avg_pool2d(values, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
    return values


def _warped(image: Tensor, flow: Tensor) -> Tensor:
    """`image` [N, 1, H, W] sampled at p + flow(p)."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height, dtype=flow.dtype), torch.arange(width, dtype=flow.dtype), indexing="ij")
    grid = torch.stack(
        [(x + flow[:, 0]) * 2 / max(width - 1, 1) - 1, (y + flow[:, 1]) * 2 / max(height - 1, 1) - 1], dim=-1
    )
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def _resized(flow: Tensor, like: Tensor) -> Tensor:
    """Flow at the size of `like`, in its pixels."""
    height, width = like.shape[-2:]
    scale = torch.tensor([width / flow.shape[-1], height / flow.shape[-2]]).view(1, 2, 1, 1)
    return F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False) * scale

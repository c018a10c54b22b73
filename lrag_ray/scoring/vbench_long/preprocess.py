"""From frames to network inputs, exactly as VBench resizes them.

Everything works on float32 0..255 tensors [T, 3, H, W]; bicubic overshoot outside that range is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lrag_ray.scoring.vbench_long.clips import Frame

SIDE = 224
"""Input side of every vision transformer here."""
DINOV2_RESIZE = 256
"""Shorter side before DINOv2's centre crop."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def normalise(images: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """0..1 images [T, 3, H, W] minus mean, over standard deviation, per channel."""
    mean, std = _on(images.device, statistics)
    return (images - mean) / std


@cache
def _on(device: torch.device, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each [1, 3, 1, 1], copied to a device once: each copy waits for all that the device does."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
    return mean, std


def resize(images: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"], antialias: bool) -> Tensor:
    """[T, 3, H, W] to [T, 3, *size]; images of that size already are returned as they are."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode=mode, align_corners=False, antialias=antialias)


def resize_shorter(images: Tensor, side: int, mode: Literal["bilinear", "bicubic"], antialias: bool) -> Tensor:
    """Shorter side to `side`, longer side truncated to whole pixels."""
    height, width = images.shape[2:]
    if height <= width:
        return resize(images, (side, int(side * width / height)), mode, antialias)
    return resize(images, (int(side * height / width), side), mode, antialias)


def centre_crop(images: Tensor, side: int) -> Tensor:
    """The middle [T, 3, side, side]; half pixels round to even."""
    top, left = (round((length - side) / 2) for length in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def pad_to_multiple(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Replicate the borders, split evenly, until both sides are multiples; also where (top, left) the image begins."""
    rest_h, rest_w = (-length % multiple for length in images.shape[2:])
    top, left = rest_h // 2, rest_w // 2
    return F.pad(images, [left, rest_w - left, top, rest_h - top], mode="replicate"), (top, left)


class ClipFrames:
    """The frames of one clip on the device, with what several dimensions share."""

    def __init__(self, frames: Sequence[Frame], fps: int, device: torch.device) -> None:
        given = [torch.from_numpy(frame) for frame in frames]
        # Bytes go to a GPU from pinned memory, and become floats there, batch by batch.
        pinned = device.type == "cuda"
        stacked = torch.empty((len(given), *given[0].shape), dtype=torch.uint8, pin_memory=pinned)
        torch.stack(given, out=stacked)
        self.uint8 = stacked.to(device, non_blocking=pinned).permute(0, 3, 1, 2).contiguous()
        """[T, 3, H, W]."""
        self.fps = fps
        """Truncated frame rate."""

    def __len__(self) -> int:
        return len(self.uint8)

    @cached_property
    def clip_input(self) -> Tensor:
        """[T, 3, 224, 224] for both CLIP networks. Chunks bound the float copies."""
        chunks = [resize_shorter(part.float(), SIDE, "bicubic", antialias=False) for part in self.uint8.split(8)]
        return normalise(torch.cat([centre_crop(chunk, SIDE) for chunk in chunks]) / 255, CLIP)

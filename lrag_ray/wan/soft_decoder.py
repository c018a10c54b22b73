"""Random VAE decoders that are fit to be looked at.

Plain random kernels paint noise that strobes at the frame rate, and a random generator adds the grid of its patches.
`soften` keeps the architecture and the randomness of how channels mix, and makes the kernels smooth in space and time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_TENT = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 6
"""Unit-norm tent; zero at the Nyquist frequency, so it removes the period of a 2 x 2 patch exactly."""
_SMOOTH_SPACE, _SMOOTH_TIME = 0.8, 0.7
_BRANCH_GAIN = 0.3
"""Residual branches are kept small: a deep random stack would wash every video to one colour."""
_OUTPUT_GAIN = 0.4


@torch.no_grad()
def soften(decoder: nn.Module) -> None:
    """Change the random kernels of an AutoencoderKLWan decoder in place."""
    for name, parameter in decoder.named_parameters():
        if ".time_conv." in name:
            # The two halves make the two frames of an upsampled pair; different halves would flicker.
            half = parameter.chunk(2)[0]
            if half.dim() == 5:
                half = half.mean(2, keepdim=True).expand_as(half) * math.sqrt(3)
            parameter.copy_(torch.cat([half, half]))
        elif parameter.dim() >= 4 and parameter.shape[-2:] == (3, 3):
            parameter.copy_(_smooth(parameter, 1.0 if name.startswith("conv_in") else _SMOOTH_SPACE))
        if ".conv2." in name or ".proj." in name:
            parameter.mul_(_BRANCH_GAIN)
        elif name == "conv_out.weight":
            parameter.mul_(_OUTPUT_GAIN)


def _smooth(kernel: Tensor, space: float) -> Tensor:
    """Mix of a random kernel [O, I, (T,) 3, 3] and its smooth part of the same energy."""
    if kernel.dim() == 5:
        mean = kernel.mean(2, keepdim=True) * math.sqrt(kernel.shape[2])
        kernel = (1 - _SMOOTH_TIME) * kernel + _SMOOTH_TIME * mean
    return (1 - space) * kernel + space * 3 * kernel.mean((-2, -1), keepdim=True) * _TENT

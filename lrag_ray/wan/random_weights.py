"""Random weights from a fixed recipe, for the embedded tiny backbone and for full-size trials without a checkpoint.

Every parameter is drawn from its own CPU generator, keyed by seed and parameter name, so that the weights do not
depend on the order of construction, the device or the global random state.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lrag_ray.wan.keyed import keyed_generator


@torch.no_grad()
def fill_random(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Fill every parameter of `module` in place from (seed, parameter name).

    Matrices and kernels are normal with standard deviation gain / sqrt(fan_in), vectors named ``weight`` or ``gamma``
    (norm scales) are normal around 1, all other vectors are small. The scales keep activations of order 1.
    """
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=keyed_generator("weights", seed, name))
        if parameter.squeeze().dim() >= 2 and not name.endswith("modulation"):
            draw *= gain / math.sqrt(parameter[0].numel())
        elif name.rsplit(".", 1)[-1] in ("weight", "gamma"):
            draw = 1 + 0.1 * draw
        else:
            draw *= 0.1
        parameter.copy_(draw.to(parameter.dtype))

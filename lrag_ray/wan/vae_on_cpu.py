"""What makes decoding fast on a CPU: oneDNN for all 3-D convolutions, and a norm that reads its input in order.

torch takes oneDNN for a 3-D convolution of one video only where it thinks it large, and else a kernel that is several
times slower; `F.normalize` over the channels strides through memory. Values differ from torch's in the last bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def speed_up(model: Any) -> None:
    """Replace the arithmetic of a decoder of AutoencoderKLWan for float32 on the CPU; other types keep theirs."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module._conv_forward = _Convolution(module)  # type: ignore[method-assign,assignment]
        elif isinstance(module, WanRMS_norm):
            module.forward = _Norm(module, module.forward)


def _ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class _Convolution:
    """`nn.Conv3d._conv_forward` of a module that pads with zeros, as all of the VAE's do."""

    def __init__(self, module: nn.Conv3d) -> None:
        self._module = module

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m: Any = self._module
        if _ours(x):
            y: Tensor = torch.mkldnn_convolution(x, weight, bias, m.padding, m.stride, m.dilation, m.groups)
            return y
        return nn.Conv3d._conv_forward(m, x, weight, bias)


class _Norm:
    """`WanRMS_norm.forward`: x / |x| · sqrt(channels) · gamma + bias, over dimension 1."""

    def __init__(self, module: Any, usual: Any) -> None:
        self._module, self._usual = module, usual

    def __call__(self, x: Tensor) -> Tensor:
        m = self._module
        if _ours(x) and m.channel_first:
            length = x.square().sum(dim=1, keepdim=True).clamp(min=1e-24).rsqrt()
            return x * (length * m.scale) * m.gamma + m.bias
        y: Tensor = self._usual(x)
        return y

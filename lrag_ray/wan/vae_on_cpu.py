"""What makes decoding fast on a CPU: oneDNN for all 3-D convolutions, and a norm that reads its input in order.

torch takes oneDNN for a 3-D convolution of one video only where it thinks it large, and else a kernel that is several
times slower; `F.normalize` over the channels strides through memory. Zeros around a frame are the convolution's own
here, not a larger copy of the frame. Values differ from torch's in the last bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def speed_up(model: Any) -> None:
    """Replace the arithmetic of parts of AutoencoderKLWan for float32 on the CPU; other types keep theirs."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm

    for module in model.modules():
        if isinstance(module, WanCausalConv3d):
            module.forward = _Convolution(module, module.forward)
        elif isinstance(module, WanRMS_norm):
            module.forward = _Norm(module, module.forward)


def _ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class _Convolution:
    """`WanCausalConv3d.forward`: in time, two frames before the first, which are cached ones or zeros."""

    def __init__(self, module: Any, usual: Any) -> None:
        self._module, self._usual = module, usual

    def __call__(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        m = self._module
        if not _ours(x):
            y: Tensor = self._usual(x, cache_x)
            return y
        columns, _, rows, _, before, _ = m._padding
        if cache_x is not None and before:
            x = torch.cat([cache_x, x], dim=2)
            before -= cache_x.shape[2]
        if before:
            x = F.pad(x, (0, 0, 0, 0, before, 0))
        y = torch.mkldnn_convolution(x, m.weight, m.bias, (0, rows, columns), m.stride, m.dilation, m.groups)
        return y


class _Norm:
    """`WanRMS_norm.forward`: x / |x| · sqrt(channels) · gamma + bias, over dimension 1."""

    def __init__(self, module: Any, usual: Any) -> None:
        self._module, self._usual = module, usual

    def __call__(self, x: Tensor) -> Tensor:
        m = self._module
        if not (_ours(x) and m.channel_first):
            y: Tensor = self._usual(x)
            return y
        length = x.square().sum(dim=1, keepdim=True).clamp(min=1e-24).rsqrt()
        y = (x * (length * m.scale)).mul_(m.gamma)
        # Without a bias it is the number 0.
        return y.add_(m.bias) if isinstance(m.bias, Tensor) else y

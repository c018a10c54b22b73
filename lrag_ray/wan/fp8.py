"""Matrix products of the layers in 8-bit floats (`backbones.<name>.products: fp8`).

Weights are rounded to e4m3 once, when the generator is loaded, with one scale per output channel; the rows that they
multiply are rounded in every pass, with one scale per token. Products are summed in float32. A GPU of compute
capability 8.9 or later does it in one kernel of torch (`torch._scaled_mm`); on the CPU the same values are multiplied
in float32, which is slow and for trials alone. The order of a sum is the only difference.

What is left in the backbone's own precision: attention, the keys and values of the text (computed once per rollout),
embeddings and the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrag_ray.wan.kernel_trial import has_triton, refusal_of
from lrag_ray.wan.kernels import Products
from lrag_ray.wan.transformer import CausalWanTransformer, WanBlock

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
"""448."""
_LEAST = 1e-12
"""Largest value of a row below which it is all zeros."""


class Rounded(NamedTuple):
    """Rows of a matrix in e4m3."""

    values: Tensor
    """e4m3 [rows, width]."""
    scales: Tensor
    """float32 [rows, 1]: what a row's values are multiplied by."""

    def exact(self) -> Tensor:
        """What they stand for, float32 [rows, width]."""
        return self.values.float() * self.scales


def rounded(x: Tensor) -> Rounded:
    """Rows of x [rows, width], each divided so that its largest value is 448, to the nearest of e4m3."""
    if has_triton(x.device) and kernel_refusal(x.device) is None:
        return _rounded_at_once(x)
    return plainly_rounded(x)


def plainly_rounded(x: Tensor) -> Rounded:
    """`rounded` by torch's operations; the kernel gives the same bits."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp_min(_LEAST)
    scales = largest / LARGEST
    return Rounded((x.float() / scales).to(E4M3), scales)


def _rounded_at_once(x: Tensor) -> Rounded:
    from lrag_ray.wan.fp8_kernel import round_kernel

    rows, width = x.shape
    x = x.contiguous()
    values = torch.empty_like(x, dtype=E4M3)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = 1 << (width - 1).bit_length()
    with torch.cuda.device_of(x):
        # 64 values of a row in the registers of a thread at most, also for the feed-forward's width.
        warps = min(16, max(4, block // 2048))
        round_kernel[(rows,)](x, values, scales, width, LARGEST, _LEAST, BLOCK=block, num_warps=warps)
    return Rounded(values, scales)


class Fp8Linear(nn.Module):
    """A linear layer whose products are those of e4m3 values."""

    def __init__(self, linear: nn.Linear) -> None:
        """The layer's weights, rounded."""
        super().__init__()
        weight = plainly_rounded(linear.weight.detach())
        self.register_buffer("weight", weight.values)
        self.register_buffer("scales", weight.scales.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of x [..., in], in the dtype of x."""
        rows = rounded(x.flatten(0, -2))
        weight, scales = cast(Tensor, self.weight), cast(Tensor, self.scales)
        if x.is_cuda:
            out: Tensor = torch._scaled_mm(rows.values, weight.t(), rows.scales, scales, self.bias, out_dtype=x.dtype)
        else:
            out = (F.linear(rows.values.float(), weight.float()) * rows.scales * scales + self.bias).to(x.dtype)
        return out.view(*x.shape[:-1], -1)


def use(products: Products, model: CausalWanTransformer) -> None:
    """Let the layers of a loaded generator compute their products so; for inference alone.

    Raises ValueError where its device or precision cannot, with the way out.
    """
    if products == "exact":
        return
    weight = model.patch_embedding.weight
    if reason := refusal(weight.device, weight.dtype):
        raise ValueError(f"products fp8: {reason}. Fix: leave products out, or set it to exact")
    for block in model.blocks:
        layer = cast(WanBlock, block)
        own, text = layer.self_attn, layer.cross_attn
        for module, names in ((own, "qkvo"), (text, "qo"), (layer.ffn, "02")):
            for name in names:
                setattr(module, name, Fp8Linear(cast(nn.Linear, getattr(module, name))))


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this device does not compute such products, in words; None where it does."""
    if device.type != "cuda":
        return None
    if dtype != torch.bfloat16:
        return f"a GPU computes them for bfloat16, not for {str(dtype).removeprefix('torch.')}"
    return _product_refusal(device)


@cache
def _product_refusal(device: torch.device) -> str | None:
    """A product on the device beside the same values multiplied in float32."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"they need a GPU of compute capability 8.9, and this one has {major}.{minor}"
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(48, 64, generator=draw), torch.randn(32, 64, generator=draw)
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight)
    plain = Fp8Linear(linear)
    there = Fp8Linear(linear).to(device)

    def trial(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        if dtype == torch.bfloat16:
            yield there(x.to(device, dtype)).cpu(), plain(x.to(dtype))

    with torch.no_grad():
        return refusal_of(trial)


@cache
def kernel_refusal(device: torch.device) -> str | None:
    """Why this device does not take the kernel that rounds, in words; None where it does."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "before compute capability 9.0 it rounds twice"

    def trial(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        x = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        x[3] = 0
        ours, theirs = _rounded_at_once(x), plainly_rounded(x)
        yield ours.values.view(torch.uint8), theirs.values.view(torch.uint8)
        yield ours.scales, theirs.scales

    return refusal_of(trial)


def notes(products: Products, device: torch.device) -> list[str]:
    """Why the kernel that rounds is not used, where it was meant to be."""
    reason = kernel_refusal(device) if products == "fp8" and has_triton(device) else None
    return [] if reason is None else [f"plain operations round to fp8, which is slower: {reason}"]

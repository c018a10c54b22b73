"""The fused kernels under Triton's interpreter against the plain operations; run with TRITON_INTERPRET=1.

Prints one JSON object: by case the largest difference as a share of the largest value, and the share that differs.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor

from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.wan import fp8, fused_rows, norm_silu, residual_norm
from lrag_ray.wan.kernels import Kernels
from lrag_ray.wan.rope import Angles, rotate
from lrag_ray.wan.transformer import Projected, RMSNorm
from lrag_ray.wan.vae import tiny_vae
from tests.tiny import generate, start, tiny_transformer


def rows_of(dtype: torch.dtype, batch: int, width: int, heads: int, own_turns: bool) -> dict[str, tuple[float, float]]:
    """One call of the kernel, in a buffer with rows before and behind its own."""
    draw, rows, head_dim = torch.Generator().manual_seed(width), 3, width // heads
    q, k, v = torch.randn(3, batch, rows, width, generator=draw).to(dtype)
    norms = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
    for norm in norms:
        norm.weight = torch.nn.Parameter((0.5 + torch.rand(width, generator=draw)).to(dtype), requires_grad=False)
    shape = (batch, rows, 1, head_dim // 2) if own_turns else (rows, 1, head_dim // 2)
    angles = Angles(torch.polar(torch.ones(shape), 6 * torch.rand(shape, generator=draw)))
    buffers = torch.full((2, batch, rows + 7, heads, head_dim), 9.0, dtype=dtype)
    k_out, v_out = buffers[:, :, 4 : 4 + rows]
    projected = Projected(q, k, v, *norms, heads=heads)
    turned, kept = fused_rows.write_rows(projected, angles, k_out, v_out, keep=True)
    again, none = fused_rows.write_rows(projected, angles, k_out, v_out, keep=False)
    assert none is None and torch.equal(again, turned)
    assert kept is not None and bool((buffers[:, :, :4] == 9).all() and (buffers[:, :, 4 + rows :] == 9).all())
    assert torch.equal(v_out, v.view(v_out.shape))
    plain_q, plain_k = (_normed(x, norm).unflatten(-1, (heads, -1)) for x, norm in ((q, norms[0]), (k, norms[1])))
    plain = {"queries": _turned(plain_q, angles), "keys": _turned(plain_k, angles), "kept keys": plain_k}
    made = {"queries": turned, "keys": k_out, "kept keys": kept}
    return {name: _differences(made[name], plain[name]) for name in made}


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """`RMSNorm`, rounded as the interpreter rounds."""
    if x.dtype == torch.float32:
        return torch.as_tensor(norm(x))
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    return _cut(_cut(exact).float() * norm.weight.float())


def _turned(x: Tensor, angles: Angles) -> Tensor:
    """`rotate`, rounded as the interpreter rounds."""
    return rotate(x, angles) if x.dtype == torch.float32 else _cut(rotate(x.float(), angles))


def _cut(x: Tensor) -> Tensor:
    """To bfloat16 towards zero: the interpreter does so, and a GPU rounds to the nearest."""
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def rollout() -> tuple[float, float]:
    """Latents of a rollout with both kernels and without; a replayed one goes on with the same bits."""
    model = tiny_transformer(Kernels(fused_layers=True), dim=32)
    results = list(start(model, InfinityRope).blocks(2))
    again = start(model, InfinityRope)
    again.replay(results[0].latents)
    assert torch.equal(next(iter(again.blocks(1))).latents, results[1].latents)
    plain = start(tiny_transformer(Kernels(fused_rows=False), dim=32), InfinityRope)
    assert again.context.fuses and not plain.context.fuses
    assert residual_norm.fuses(model.kernels, torch.device("cpu"))
    return _differences(torch.cat([each.latents for each in results], dim=1), generate(plain, 2))


def layers_of(dtype: torch.dtype, batch: int, width: int) -> dict[str, tuple[float, float]]:
    """The kernel of `residual_norm` between the matrix products of a layer, three frames of two tokens."""
    draw = torch.Generator().manual_seed(width)
    x, y, time = (
        torch.randn(batch, *shape, generator=draw).to(dtype) for shape in ((6, width),) * 2 + ((3, 6, width),)
    )
    gate, shift, scale, *_ = time.chunk(6, dim=2)
    bare, own = torch.nn.LayerNorm(width, 1e-6, elementwise_affine=False), torch.nn.LayerNorm(width, 1e-6).to(dtype)
    own.requires_grad_(False).weight.copy_(torch.randn(width, generator=draw))
    steps: dict[str, tuple[Any, ...]] = {
        "norm": (None, None, bare, shift, scale),
        "gated": (y, gate, own),
        "sum": (y, None, bare, shift, scale),
    }
    found: dict[str, tuple[float, float]] = {}
    for name, (added, *rest) in {**steps, "last": (y, gate)}.items():
        ours, theirs = x.clone(), x.clone()
        made = residual_norm.fused(ours, added, *rest)
        plain = _stepped(theirs, added, *rest)
        found |= {name: _differences(made, plain), f"{name} in place": _differences(ours, theirs)}
    return found


def _stepped(
    x: Tensor, y: Tensor | None, gate: Tensor | None, norm: Any = None, shift: Any = None, scale: Any = None
) -> Tensor:
    """`residual_norm.plain`, rounded as the interpreter rounds."""
    if x.dtype == torch.float32:
        return residual_norm.plain(x, None if y is None else y.clone(), gate, norm, shift, scale)
    if y is not None:
        added = y if gate is None else _cut(y.float().unflatten(1, (3, -1)) * gate.float()).flatten(1, 2)
        x.copy_(_cut(x.float() + added.float()))
    if norm is None:
        return x
    centred = x.float() - x.float().mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
    if shift is None:
        return _cut(normed * norm.weight.float() + norm.bias.float())
    scaled = _cut(_cut(normed).float().unflatten(1, (3, -1)) * scale.float())
    return _cut(scaled.float() + shift.float()).flatten(1, 2)


def fp8_rows(dtype: torch.dtype, width: int) -> dict[str, tuple[float, float]]:
    """The kernel that rounds to e4m3."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    x[2], x[3] = 0, 1e4 * x[3]
    made, plain = fp8._rounded_at_once(x), fp8.plainly_rounded(x)
    # The interpreter loses the carry where rounding reaches the next power of two; a GPU does not.
    exact, values = (x.float() / plain.scales).abs(), plain.values.float().abs()
    carried = (torch.frexp(values).mantissa == 0.5) & (exact < values)
    assert 0 < float(carried.float().mean()) < 0.1
    found = torch.where(carried, plain.values.float(), made.values.float())
    return {"values": _differences(found, plain.values.float()), "scales": _differences(made.scales, plain.scales)}


def normed_pixels(dtype: torch.dtype, width: int, *, bias: bool) -> dict[str, tuple[float, float]]:
    """The kernel of `norm_silu` beside diffusers' norm and SiLU in float32, of pixels in both layouts; one is all 0."""
    draw = torch.Generator().manual_seed(width)
    norm = WanRMS_norm(width, images=False, bias=bias).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
    norm = norm.to(dtype)
    x = (3 * torch.randn(2, width, 3, 2, 3, generator=draw)).to(dtype)
    x[1, :, 2, 1, 2] = 0
    made = norm_silu.fused(x, norm.gamma, norm.bias if bias else None)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(norm_silu.fused(last, norm.gamma, norm.bias if bias else None), made) and made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last_3d)
    exact = F.silu(norm.float()(x.float()))
    return {"pixels": _differences(made, _cut(exact) if dtype == torch.bfloat16 else exact.to(dtype))}


def decoded(dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Pixels of the tiny VAE in a precision beside those in float32: with the kernel, and without."""
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = tiny_vae().decode(latents)
    vae = tiny_vae()
    torch.nn.Module.to(vae.model, dtype)
    vae.keep_channels_last()
    plain = vae.decode(latents)
    vae.fuse_norms()
    assert norm_silu.unused(torch.device("cpu")) is None
    return {"fused": _differences(vae.decode(latents), exact), "plain": _differences(plain, exact)}


def _differences(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest one as a share of the largest value, and the share of values that differ."""
    apart = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    return float(apart), float((found != expected).float().mean())


if __name__ == "__main__":
    assert fused_rows.refusal(torch.device("cpu")) is residual_norm.refusal(torch.device("cpu")) is None
    rows = {
        f"{str(dtype).removeprefix('torch.')} {width}/{heads} batch {batch}{' apart' * own}": rows_of(
            dtype, batch, width, heads, own
        )
        for dtype in (torch.float32, torch.bfloat16)
        for batch, width, heads, own in ((1, 1536, 12, False), (2, 48, 2, True), (2, 48, 2, False))
    }
    layers = {
        f"{str(dtype).removeprefix('torch.')} layers of {width}": layers_of(dtype, batch, width)
        for dtype in (torch.float32, torch.bfloat16)
        for batch, width in ((1, 1536), (2, 48))
    }
    rounded = {
        f"rounded {str(dtype).removeprefix('torch.')} {width}": fp8_rows(dtype, width)
        for dtype, width in ((torch.float32, 1536), (torch.bfloat16, 48))
    }
    pixels = {
        f"{str(dtype).removeprefix('torch.')} pixels of {width}": normed_pixels(dtype, width, bias=width in (8, 384))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for width in (3, 8, 96, 384)
    }
    whole = {
        f"decoded in {str(dtype).removeprefix('torch.')}": decoded(dtype) for dtype in (torch.float32, torch.float16)
    }
    print(json.dumps(rows | layers | rounded | pixels | whole | {"rollout": {"latents": rollout()}}))

"""The fused kernel under Triton's interpreter against the plain operations; run with TRITON_INTERPRET=1.

Prints one JSON object: by case the largest difference as a share of the largest value, and the share that differs.
"""

from __future__ import annotations

import json

import torch

from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.wan import fused_rows
from lrag_ray.wan.kernels import Kernels
from lrag_ray.wan.rope import Angles, rotate
from lrag_ray.wan.transformer import Projected, RMSNorm
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


def _normed(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """`RMSNorm`, rounded as the interpreter rounds."""
    if x.dtype == torch.float32:
        return torch.as_tensor(norm(x))
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
    return _cut(_cut(exact).float() * norm.weight.float())


def _turned(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """`rotate`, rounded as the interpreter rounds."""
    return rotate(x, angles) if x.dtype == torch.float32 else _cut(rotate(x.float(), angles))


def _cut(x: torch.Tensor) -> torch.Tensor:
    """To bfloat16 towards zero: the interpreter does so, and a GPU rounds to the nearest."""
    return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def rollout() -> tuple[float, float]:
    """Latents of a rollout with the kernel and without; a replayed one goes on with the same bits."""
    model = tiny_transformer(dim=32)
    results = list(start(model, InfinityRope).blocks(2))
    again = start(model, InfinityRope)
    again.replay(results[0].latents)
    assert torch.equal(next(iter(again.blocks(1))).latents, results[1].latents)
    plain = start(tiny_transformer(Kernels(fused_rows=False), dim=32), InfinityRope)
    assert again.context.fuses and not plain.context.fuses
    return _differences(torch.cat([each.latents for each in results], dim=1), generate(plain, 2))


def _differences(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The largest one as a share of the largest value, and the share of values that differ."""
    apart = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    return float(apart), float((found != expected).float().mean())


if __name__ == "__main__":
    assert fused_rows.refusal(torch.device("cpu")) is None
    rows = {
        f"{str(dtype).removeprefix('torch.')} {width}/{heads} batch {batch}{' apart' * own}": rows_of(
            dtype, batch, width, heads, own
        )
        for dtype in (torch.float32, torch.bfloat16)
        for batch, width, heads, own in ((1, 1536, 12, False), (2, 48, 2, True), (2, 48, 2, False))
    }
    print(json.dumps(rows | {"rollout": {"latents": rollout()}}))

"""The table: where a pass spends its time, blocks of every method at every depth, decoding and scoring."""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from lrag_ray.context.policy import Layout
from lrag_ray.printable import counted
from lrag_ray.retrieval.history import TieredBank
from lrag_ray.retrieval.payload import FrameShape, make_payload
from lrag_ray.retrieval.similarity import HostCopy
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.stages.rollout.background import BackgroundThread
from lrag_ray.wan import fp8, fused_rows, norm_silu, residual_norm
from lrag_ray.wan.attention import attention, backend_of
from lrag_ray.wan.devices import DEVICES
from lrag_ray.wan.flops import block_flops
from lrag_ray.wan.kernels import Backend, Kernels, Products
from lrag_ray.wan.rope import Rope, rotate, rotate_into
from lrag_ray.wan.transformer import CausalWanTransformer
from scripts.gpu.harness import GIGA, METHODS, SAMPLER, SIZES, VIDEO_FRAMES_PER_LATENT, Bench
from scripts.gpu.scoring import scoring

T = TypeVar("T", str, int)
NO_VAE = "skipped: the VAE needs diffusers, which is not installed"


def table(bench: Bench, golden: Path | None) -> None:
    """All parts of the table, the longest first."""
    bench.part("operations", lambda: _operations(bench))
    bench.part("kernels", lambda: _kernels(bench))
    for depth_s in bench.size.depths_s:
        bench.part(f"depth {depth_s} s", lambda depth_s=depth_s: _depth(bench, depth_s))  # type: ignore[misc]
    bench.part("fused layers", lambda: _fused_layers(bench))
    bench.part("prompts per pass", lambda: _prompts_per_pass(bench))
    bench.part("fp8 products", lambda: _fp8_products(bench))
    bench.part("decode", lambda: _decode(bench))
    bench.part("decode beside rag", lambda: _decode_beside(bench))
    scoring(bench)


def _operations(bench: Bench) -> dict[str, dict[str, float]]:
    """Milliseconds of each operation of a pass with 12 attended frames, with its arithmetic or traffic."""
    config = bench.size.model
    f, n = config.tokens_per_frame(*bench.size.latent[1:]), SAMPLER.frames_per_block
    rows, keys, heads, d = n * f, 12 * f, config.num_heads, config.dim
    x, q = bench.draw(1, rows, d), bench.draw(1, rows, heads, config.head_dim)
    k, text_k = bench.draw(1, keys, heads, config.head_dim), bench.draw(1, config.text_len, heads, config.head_dim)
    model = bench.filled(CausalWanTransformer, config)
    layer: Any = model.blocks[0]
    angles = Rope(config.head_dim, config.token_grid(*bench.size.latent[1:]), bench.device).frames(range(n))
    time_context = model.embed_time(torch.full((1, n), 500.0, device=bench.device)).layers[0]
    hidden, traffic = bench.draw(1, rows, config.ffn_dim), x.nbytes
    runs: dict[str, tuple[Callable[[], object], float, float]] = {
        "projection (4 + 2 of them)": (lambda: layer.self_attn.q(x), 2 * rows * d * d, 0),
        "feed-forward in": (lambda: layer.ffn[0](x), 2 * rows * d * config.ffn_dim, 0),
        "GELU": (lambda: layer.ffn[1](hidden), 0, 2 * hidden.nbytes),
        "feed-forward out": (lambda: layer.ffn[2](hidden), 2 * rows * d * config.ffn_dim, 0),
        "self-attention": (lambda: attention(q, k, k), 4 * rows * keys * d, 0),
        "cross-attention": (lambda: attention(q, text_k, text_k), 4 * rows * config.text_len * d, 0),
        "query/key norm": (lambda: layer.self_attn.norm_q(x), 0, 2 * traffic),
        "rotation": (lambda: rotate(q, angles), 0, 2 * traffic),
        "layer norm": (lambda: layer.norm1(x), 0, 2 * traffic),
        "modulation": (lambda: x.unflatten(1, (n, -1)) * time_context.scale1, 0, 2 * traffic),
    }
    found = {}
    for name, (run, flops, nbytes) in runs.items():
        seconds = bench.seconds(run)
        found[name] = {"ms": 1e3 * seconds} | ({"tflops": flops / seconds / 1e12} if flops else {})
        found[name] |= {"gb_per_s": nbytes / seconds / GIGA} if nbytes else {}
    return found


def _kernels(bench: Bench) -> dict[str, Any]:
    """Self-attention over 12 frames by every kernel, and the fused norm, rotation and write beside the plain one."""
    config, n = bench.size.model, SAMPLER.frames_per_block
    grid = config.token_grid(*bench.size.latent[1:])
    rows, keys, heads, width = n * grid[0] * grid[1], 12 * grid[0] * grid[1], config.num_heads, config.head_dim
    q, k = bench.draw(1, rows, heads, width), bench.draw(1, keys, heads, width)
    found: dict[str, Any] = {}
    for choice in get_args(Backend):
        try:
            backend_of(choice, bench.device, q.dtype, width)
        except ValueError as error:
            found[choice] = str(error)
        else:
            found[choice] = {"ms": 1e3 * bench.seconds(lambda choice=choice: attention(q, k, k, choice))}  # type: ignore[misc]
    layer: Any = bench.filled(CausalWanTransformer, config).blocks[0]
    projected = layer.self_attn.projected(bench.draw(1, rows, config.dim))
    angles, out = Rope(width, grid, bench.device).frames(range(n)), torch.empty_like(q)

    def plain() -> None:
        k_normed, v = projected.keys_values()
        rotate(projected.queries(), angles)
        rotate_into(out, k_normed, angles)
        out.copy_(v)

    found["plain rows"] = {"ms": 1e3 * bench.seconds(plain)}
    refusal = fused_rows.refusal(bench.device) if bench.cuda else "runs on GPUs alone"
    found["fused rows"] = refusal or {
        "ms": 1e3
        * bench.seconds(lambda: fused_rows.write_rows(projected, angles, out, torch.empty_like(out), keep=False))
    }
    return found


def _fused_layers(bench: Bench) -> dict[str, Any] | str:
    """Blocks of infinity_rope with `engine.fused_layers` and without, in turn."""
    if refused := residual_norm.refusal(bench.device) if bench.cuda else "runs on GPUs alone":
        return f"skipped: {refused}"
    rollouts = {}
    for name in ("plain", "fused"):
        model = bench.filled(CausalWanTransformer, bench.size.model)
        model.kernels = Kernels(fused_layers=name == "fused")
        rollouts[name] = bench.rollout(model, "infinity_rope", _few_slabs)
    return {name: {"ms per block": 1e3 * seconds} for name, seconds in _in_turn(bench, rollouts).items()}


def _fp8_products(bench: Bench) -> dict[str, Any] | str:
    """Blocks of infinity_rope with `products: fp8` and without, in turn, and how far their last latents are apart."""
    models = {name: bench.filled(CausalWanTransformer, bench.size.model) for name in get_args(Products)}
    for name, model in models.items():
        try:
            fp8.use(name, model)
        except ValueError as error:
            return f"skipped: {error}"
    rollouts = {name: bench.rollout(model, "infinity_rope", _few_slabs) for name, model in models.items()}
    found: dict[str, Any] = {
        name: {"ms per block": 1e3 * seconds} for name, seconds in _in_turn(bench, rollouts).items()
    }
    exact, rounded = (next(iter(rollout.blocks(1))).latents.float() for rollout in rollouts.values())
    notes = fp8.notes("fp8", bench.device)
    return found | {"latent rms": float((rounded - exact).square().mean().sqrt())} | ({"notes": notes} if notes else {})


def _prompts_per_pass(bench: Bench) -> dict[str, dict[str, float]]:
    """Blocks of rag with one prompt and with two as rows of the same passes (`engine.prompts_per_pass`), in turn."""
    model = bench.filled(CausalWanTransformer, bench.size.model)
    prompts = ("fox", "tram")
    rollouts = {n: bench.rollout(model, "rag", _few_slabs, *prompts[:n]) for n in (1, 2)}
    return {
        counted(n, "prompt"): {"ms per block and prompt": 1e3 * seconds / n}
        for n, seconds in _in_turn(bench, rollouts).items()
    }


def _in_turn(bench: Bench, rollouts: Mapping[T, Rollout]) -> dict[T, float]:
    """Median seconds of a block of each, of as many blocks behind as many that are not counted."""
    times: dict[T, list[float]] = {name: [] for name in rollouts}
    streams = {name: rollout.blocks(2 * bench.size.blocks) for name, rollout in rollouts.items()}
    for turn in range(2 * bench.size.blocks):
        for name, blocks in streams.items():
            bench.wait()
            began = time.perf_counter()
            next(blocks)
            bench.wait()
            if turn >= bench.size.blocks:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _depth(bench: Bench, depth_s: int) -> dict[str, dict[str, Any]]:
    """Blocks of all methods in turn, each rebuilt to just before the depth; FPS of video, without decoding."""
    model, n = bench.filled(CausalWanTransformer, bench.size.model), SAMPLER.frames_per_block
    before = max(5, round(depth_s * 16 / VIDEO_FRAMES_PER_LATENT) // n - bench.size.blocks)
    rollouts = {method: bench.rollout(model, method, _few_slabs) for method in METHODS}
    for method, rollout in rollouts.items():
        for block in range(before):
            generator = torch.Generator(bench.device).manual_seed(block)
            latents = torch.randn(1, n, *bench.size.latent, generator=generator, device=bench.device)
            rollout.replay(latents, [[_newest_rows(bench, block)]] if method == "deep_forcing" else None)
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    streams = {method: rollout.blocks(bench.size.blocks + 1) for method, rollout in rollouts.items()}
    for turn in range(bench.size.blocks + 1):
        for method, blocks in streams.items():
            bench.wait()
            began = time.perf_counter()
            next(blocks)
            bench.wait()
            if turn:
                times[method].append(time.perf_counter() - began)
    peak = next((d.bf16_tflops for d in DEVICES if bench.cuda and d.name in torch.cuda.get_device_name()), None)
    plain = statistics.median(times["infinity_rope"])
    found: dict[str, dict[str, Any]] = {}
    for method, taken in times.items():
        median = statistics.median(taken)
        tflops = block_flops(bench.size.model, SAMPLER, *bench.size.latent[1:], 12) / median / 1e12
        found[method] = {
            "ms per block": 1e3 * median,
            "spread": (max(taken) - min(taken)) / median,
            "fps": n * VIDEO_FRAMES_PER_LATENT / median,
            "over infinity_rope": median / plain - 1,
            "mfu": tflops / peak if peak else None,
        }
    if bench.cuda:
        found["all"] = {"peak_gb": torch.cuda.max_memory_allocated(bench.device) / GIGA}
    return found


def _newest_rows(bench: Bench, block: int) -> dict[str, Tensor]:
    """A stored choice of Deep Forcing that keeps its newest candidates."""
    at, n = METHODS["deep_forcing"], SAMPLER.frames_per_block
    if block * n + n <= at.window:
        return {}
    f = bench.size.model.tokens_per_frame(*bench.size.latent[1:])
    candidates, kept = (at.window + n - at.sink - at.recent) * f, (at.budget - at.sink - at.recent) * f
    bits = np.zeros((bench.size.model.num_layers, candidates), dtype=np.uint8)
    bits[:, candidates - kept :] = 1
    return {"selected": torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))}


class _FewSlabs(TieredBank):
    """A host bank whose frames share a dozen slabs: the costs of a long history in the memory of a short one."""

    def _slab(self) -> Tensor:
        slabs = list(self._host.values())
        return super()._slab() if len(slabs) < _SLABS else slabs[len(slabs) % _SLABS]


_SLABS = 12


def _few_slabs(layout: Layout) -> TieredBank:
    shape = FrameShape(layout.num_layers, layout.tokens_per_frame, layout.num_heads, layout.head_dim)
    return _FewSlabs(layout.device, make_payload("exact", shape, layout.dtype))


def _decode(bench: Bench) -> dict[str, Any] | str:
    if importlib.util.find_spec("diffusers") is None:
        return NO_VAE
    vae = _vae(bench)
    latents = bench.draw(SAMPLER.frames_per_block, *bench.size.latent, dtype=torch.float32)
    found: dict[str, Any] = {}
    exact = None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in ("", ", channels last", ", channels last, fused norm"):
            name = f"{str(dtype).removeprefix('torch.')}{layout}"
            if "fused norm" in layout and (refused := norm_silu.unused(bench.device)):
                found[name] = refused
                continue
            decoder = _decoder(bench, vae, dtype, channels_last=bool(layout), fused_norm="fused norm" in layout)
            pixels = decoder.decode(latents).float()
            exact = pixels if exact is None else exact
            error = float((pixels - exact).square().mean())
            seconds = bench.seconds(lambda decoder=decoder: decoder.decode(latents), 5)  # type: ignore[misc]
            found[name] = {
                "ms per block": 1e3 * seconds,
                "fps": len(latents) * VIDEO_FRAMES_PER_LATENT / seconds,
                "psnr_db": 10 * math.log10(4 / error) if error else None,
            }
    return found


def _decode_beside(bench: Bench) -> dict[str, Any] | str:
    """FPS of video with rag: without decoding, and with each block decoded beside the next one, as a worker does it."""
    if importlib.util.find_spec("diffusers") is None:
        return NO_VAE
    from lrag_ray.video.decode import StreamingDecoder

    vae, n = _vae(bench), SAMPLER.frames_per_block
    rollout = bench.rollout(bench.filled(CausalWanTransformer, bench.size.model), "rag", _few_slabs)
    # The window is full, and frames are retrieved.
    for _ in rollout.blocks(10):
        pass
    decoders: dict[str, Any] = {
        "no decoding": None,
        "float32": StreamingDecoder(_decoder(bench, vae, torch.float32, channels_last=False)),
        "bfloat16, channels last": StreamingDecoder(_decoder(bench, vae, torch.bfloat16, channels_last=True)),
    }
    found = {}
    for name, decoder in decoders.items():
        (first,) = rollout.blocks(1)
        if decoder is not None:
            decoder.push(first.latents[0].cpu())
        bench.wait()
        began = time.perf_counter()
        with BackgroundThread(2) as background:
            # A block is read when the next one has been launched, so that the device never waits for the host.
            last: HostCopy | None = None
            for result in rollout.blocks(bench.size.blocks):
                copied = HostCopy(result.latents[0])
                if decoder is not None and last is not None:
                    background.do(decoder.push, last.read())
                last = copied
            if decoder is not None and last is not None:
                background.do(decoder.push, last.read())
            background.finish()
        bench.wait()
        found[name] = {"fps": bench.size.blocks * n * VIDEO_FRAMES_PER_LATENT / (time.perf_counter() - began)}
    return found


def _vae(bench: Bench) -> Any:
    """Wan's VAE with random weights, on the CPU."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan() if bench.size is SIZES["full"] else AutoencoderKLWan(base_dim=8, num_res_blocks=1)


def _decoder(bench: Bench, vae: Any, dtype: torch.dtype, *, channels_last: bool, fused_norm: bool = False) -> Any:
    from lrag_ray.wan.vae import WanVae

    made = WanVae(torch.nn.Module.to(copy.deepcopy(vae), bench.device, dtype).eval().requires_grad_(False))
    if channels_last:
        made.keep_channels_last()
    if fused_norm:
        made.fuse_norms()
    return made

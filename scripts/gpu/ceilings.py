"""Versions and ceilings: what the machine could do."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from lrag_ray.retrieval.slabs import PAGE_LOCKED
from scripts.gpu.harness import GIGA, SAMPLER, Bench


def ceilings(bench: Bench, golden: Path | None) -> None:
    """What the machine could do."""
    bench.part("copy", lambda: _copy(bench))
    bench.part("matrix products", lambda: _products(bench))
    bench.part("bus", lambda: _bus(bench))
    bench.part("page-locking", lambda: _page_locking(bench))


def _copy(bench: Bench) -> dict[str, float]:
    source = torch.empty(bench.size.bytes_copied, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * source.nbytes / bench.seconds(lambda: target.copy_(source)) / GIGA}


def _products(bench: Bench) -> dict[str, float]:
    rows = bench.size.model.tokens_per_frame(*bench.size.latent[1:]) * SAMPLER.frames_per_block
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for inner, outer in ((bench.size.model.dim, bench.size.model.ffn_dim), (bench.size.model.ffn_dim,) * 2):
            x, w = bench.draw(rows, inner, dtype=dtype), bench.draw(outer, inner, dtype=dtype)
            flops = 2 * rows * inner * outer
            seconds = bench.seconds(lambda x=x, w=w: F.linear(x, w))  # type: ignore[misc]
            found[f"{str(dtype).removeprefix('torch.')} {rows}x{inner}x{outer} tflops"] = flops / seconds / 1e12
    return found


def _bus(bench: Bench) -> dict[str, float] | str:
    if not bench.cuda:
        return "skipped: no bus between CPU and CPU"
    on_device = torch.empty(bench.size.bytes_copied, dtype=torch.uint8, device=bench.device)
    back = torch.empty_like(on_device)
    locked, other = (torch.empty(bench.size.bytes_copied, dtype=torch.uint8).pin_memory() for _ in range(2))
    pageable = torch.empty(bench.size.bytes_copied, dtype=torch.uint8)
    side = torch.cuda.Stream(bench.device)

    def both() -> None:
        on_device.copy_(locked, non_blocking=True)
        with torch.cuda.stream(side):
            other.copy_(back, non_blocking=True)

    each = bench.size.bytes_copied / GIGA
    return {
        "to device gb_per_s": each / bench.seconds(lambda: on_device.copy_(locked, non_blocking=True)),
        "to host gb_per_s": each / bench.seconds(lambda: locked.copy_(on_device, non_blocking=True)),
        "both ways gb_per_s": 2 * each / bench.seconds(both),
        "to device from pageable gb_per_s": each / bench.seconds(lambda: on_device.copy_(pageable), 3),
    }


def _page_locking(bench: Bench) -> dict[str, float] | str:
    if not bench.cuda:
        return "skipped: needs a CUDA driver"
    frame = bench.size.model.kv_bytes_per_frame(*bench.size.latent[1:], 2)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        slab = PAGE_LOCKED._made(frame)
        times.append(time.perf_counter() - began)
        PAGE_LOCKED._unlock(slab)
    return {"frame_gb": frame / GIGA, "ms per frame": 1e3 * statistics.median(times)}

"""Cost of retrieval per block: the paper's Table 1 (encoding, search) and what it leaves out (transfer).

Run as ``lrag-ray bench retrieval``. Encoding describes the new block's frames; search compares the newest frame with
the whole history and reads the choice back to the host; transfer brings the chosen frames' keys and values to the
device (`lrag_ray.retrieval.history`). All three overlap with generation in a rollout; here each is timed alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.history import TieredBank
from lrag_ray.retrieval.payload import FrameShape, make_payload
from lrag_ray.retrieval.similarity import Descriptor, DescriptorIndex, HostCopy, average_pool, most_similar
from lrag_ray.training.loop import make_model


@dataclass(frozen=True)
class RetrievalCost:
    """Milliseconds per block, medians."""

    descriptor: str
    history_frames: int
    """Frames that are searched."""
    encode_ms: float
    search_ms: float
    transfer_ms: float | None
    """Of `top_k` frames' keys and values; None on a CPU, where device and host are the same memory."""
    transfer_bytes: int | None


@dataclass(frozen=True)
class RetrievalBench:
    """All that was measured."""

    device: str
    latent: Sequence[int]
    """[C, H, W]."""
    frames_per_block: int
    top_k: int
    repeats: int
    costs: Sequence[RetrievalCost]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def bench_retrieval(
    device: torch.device,
    *,
    encoder: LatentAutoencoder | None = None,
    latent: tuple[int, int, int] = (16, 60, 104),
    history: Sequence[int] = (120, 480),
    kv_shape: tuple[int, int, int, int] = (30, 1560, 12, 128),
    frames_per_block: int = 3,
    top_k: int = 6,
    repeats: int = 20,
) -> RetrievalBench:
    """Measure ae (an untrained encoder of full size unless given) and avg_pool.

    `kv_shape` is [layers, tokens, heads, head_dim] of a latent frame; keys and values are bfloat16.
    """
    model = encoder or make_model(EncoderConfig(*latent), seed=0)
    model = model.to(device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(frames_per_block, *latent, generator=generator).to(device)
    transfer_ms, transfer_bytes = _transfer(device, kv_shape, top_k, repeats)
    costs = []
    descriptors: dict[str, Descriptor] = {"ae": model.encode, "avg_pool": average_pool}
    for name, describe in descriptors.items():
        encode_ms = _median_ms(lambda describe=describe: describe(block), device, repeats)  # type: ignore[misc]
        for frames in history:
            index = _filled(describe, frames, latent, device, generator)

            def search(index: DescriptorIndex = index, frames: int = frames) -> list[int]:
                return most_similar(HostCopy(index.similarities(frames - 1, 0, frames - 1)).read(), top_k)

            costs.append(
                RetrievalCost(name, frames, encode_ms, _median_ms(search, device, repeats), transfer_ms, transfer_bytes)
            )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return RetrievalBench(name, latent, frames_per_block, top_k, repeats, costs)


def _filled(
    describe: Descriptor, frames: int, latent: tuple[int, int, int], device: torch.device, generator: torch.Generator
) -> DescriptorIndex:
    """An index of `frames` frames; few are encoded, since a search does not depend on the values."""
    rows = describe(torch.randn(4, *latent, generator=generator).to(device))
    index = DescriptorIndex(lambda latents: rows[torch.arange(len(latents), device=device) % len(rows)])
    index.append(torch.zeros(frames, 1, 1, 1, device=device))
    return index


def _transfer(
    device: torch.device, kv_shape: tuple[int, int, int, int], top_k: int, repeats: int
) -> tuple[float | None, int | None]:
    if device.type != "cuda":
        return None, None
    layers, tokens, heads, width = kv_shape
    nbytes = top_k * 2 * layers * tokens * heads * width * torch.bfloat16.itemsize
    bank = TieredBank(device, make_payload("exact", FrameShape(*kv_shape), torch.bfloat16))
    rows = torch.zeros(2, *kv_shape, dtype=torch.bfloat16, device=device)
    # The device keeps what it got in the last two turns.
    turns = itertools.cycle([range(top_k * i, top_k * (i + 1)) for i in range(3)])
    for frame in range(3 * top_k):
        bank.append(frame, rows)

    def fetch() -> list[Tensor]:
        chosen = next(turns)
        bank.prefetch(chosen)
        found = bank.gather(chosen)
        return [each for layer in range(layers) for each in found.layer(layer)]

    return _median_ms(fetch, device, repeats), nbytes


def _median_ms(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    def timed() -> float:
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - began)

    timed()
    return median(timed() for _ in range(repeats))

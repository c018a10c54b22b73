"""Correctness: whether the device computes what it should."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.context.base import BaseSettings
from lrag_ray.context.policy import Layout, bank_of
from lrag_ray.context.rag import RagSettings
from lrag_ray.context.registry import policy_class
from lrag_ray.retrieval.encoder import load_encoder
from lrag_ray.retrieval.history import HistoryBank, Tiers
from lrag_ray.rollout.noise import RecordedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.transformer import CausalWanTransformer
from scripts.gpu.harness import GIGA, METHODS, SAMPLER, Bench

GOLDEN_SIZES = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "num_heads", "num_layers")
GOLDEN_TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 0.1}
"""Largest difference of a latent from the golden float32 numbers of a CPU."""
DISK = Path(tempfile.gettempdir())
BANKS: Mapping[str, Callable[[Layout], HistoryBank]] = {
    "host": bank_of(),
    "device": bank_of("exact", Tiers(device_bytes=4_000_000_000)),
    "all tiers": lambda layout: bank_of("exact", _few_each(layout))(layout),
    "bf16": bank_of("bf16"),
    "int8": bank_of("int8"),
    "int4": bank_of("int4"),
    "int8_hadamard": bank_of("int8_hadamard"),
    "int4_hadamard": bank_of("int4_hadamard"),
}
"""Storage types and tiers of the history."""


def correctness(bench: Bench, golden: Path | None) -> None:
    """Whether the device computes what it should."""
    for dtype in (torch.float32, torch.bfloat16):
        name = f"goldens {str(dtype).removeprefix('torch.')}"
        bench.part(name, lambda dtype=dtype: _goldens(bench, golden, dtype))  # type: ignore[misc]
    for bank in BANKS:
        bench.part(f"bank {bank}", lambda bank=bank: _bank(bench, bank))  # type: ignore[misc]
        for method in METHODS if bank == "host" else ["rag"]:
            label = f"replay {method}, bank {bank}"
            bench.part(label, lambda method=method, bank=bank: _replay(bench, method, bank))  # type: ignore[misc]
    bench.part("memory of rollouts in a row", lambda: _memory(bench))


def _goldens(bench: Bench, golden: Path | None, dtype: torch.dtype) -> dict[str, Any] | str:
    """Recorded rollouts of the released code (see golden/rollout/README.md), by case."""
    records = sorted(golden.glob("*.json")) if golden is not None else []
    if not records:
        return f"skipped: no golden rollouts in {golden}; name the folder with --golden"
    found = {}
    with _exact_convolutions():
        for path in records:
            record = json.loads(path.read_text(encoding="utf-8"))
            if "case" in record and "model" in record:
                latents = _golden_latents(bench, path, record, dtype)
                expected = load_file(path.with_suffix(".safetensors"))["output"][:, : latents.shape[1]]
                difference = float((latents.float().cpu() - expected).abs().max())
                good = difference <= GOLDEN_TOLERANCE[dtype]
                found[path.stem] = bench.check(f"golden {path.stem} {dtype}", good, difference)
    return found


def _golden_latents(bench: Bench, path: Path, record: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    case, model = record["case"], record["case"]["model_kwargs"]
    tensors = load_file(path.with_suffix(".safetensors"))
    sampler = SamplerConfig(
        denoising_steps=tuple(case["denoising_step_list"]),
        warp=case.get("warp", True),
        shift=model.get("timestep_shift", 8.0),
        context_timestep=float(case.get("context_noise", 0)),
        frames_per_block=case["num_frame_per_block"],
    )
    settings: Any = BaseSettings(model.get("local_attn_size", -1), model.get("sink_size", 0))
    method, weights = "base", {}
    if model.get("use_latentmem", False):
        method, encoder = "rag", model.get("ae_ckpt")
        descriptor = model.get("compression_method", "avg_pool")
        settings = RagSettings(
            settings.window, settings.sink, model.get("memory_size", 0), model.get("recent_exclude", 0), descriptor,
            encoder=encoder if descriptor == "ae" else None,
        )  # fmt: skip
        if descriptor == "ae":
            weights = {"encoder": load_encoder(path.parent / str(encoder).rsplit("/", 1)[-1]).to(bench.device)}
    config = WanConfig(**{name: record["model"][name] for name in GOLDEN_SIZES})
    n, noise = sampler.frames_per_block, tensors["noise"][:, : case.get("frames")]
    batch, frames, channels, height, width = noise.shape
    rollout = Rollout(
        load_transformer(path.parent / case["model_weights"], config, dtype=dtype, device=bench.device),
        sampler,
        policy_class(method),
        settings,
        tensors["prompt_embeds"],
        RecordedNoise(noise, tensors["renoise"].unflatten(2, (batch, n)), n),
        (channels, height, width),
        weights=weights,
    )
    return torch.cat([result.latents for result in rollout.blocks(frames // n)], dim=1)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """cuDNN rounds float32 convolutions to 10 bits by default; the golden numbers were not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _bank(bench: Bench, name: str) -> dict[str, Any]:
    """Frames come back as they were appended, while the device is busy and their rows are overwritten."""
    config, f = bench.size.model, bench.size.model.tokens_per_frame(*bench.size.latent[1:])
    layout = Layout(
        config.num_layers, config.num_heads, config.head_dim, config.token_grid(*bench.size.latent[1:]),
        SAMPLER.frames_per_block, bench.dtype, bench.device,
    )  # fmt: skip
    bank = BANKS[name](layout)
    rows = torch.empty(
        (2, config.num_layers, f, config.num_heads, config.head_dim), dtype=bench.dtype, device=bench.device
    )
    busy = bench.draw(512, 512)
    wrong = []
    for frame in range(8):
        for _ in range(20):
            busy = F.normalize(busy @ busy)
        rows.fill_(frame + 1)
        bank.append(frame, rows)
        bank.settle()
        rows.fill_(-1)
        wanted = [frame, frame // 2]
        bank.prefetch(wanted)
        retrieved = bank.gather(wanted)
        found = torch.stack([torch.cat(retrieved.layer(layer)) for layer in range(config.num_layers)])
        found = found.transpose(0, 1)
        wrong += [held for held, row in zip(wanted, found, strict=True) if float((row - held - 1).abs().max()) > 0.05]
    return bench.check(f"bank {name}", not wrong, f"{len(wrong)} wrong frames")


def _replay(bench: Bench, method: str, bank: str) -> dict[str, Any]:
    """A rollout that is rebuilt from latents goes on with the same bits."""
    model = bench.filled(CausalWanTransformer, bench.size.model)
    blocks, kept = (14, 11) if method == "rag" else (8, 6)
    results = list(bench.rollout(model, method, BANKS[bank]).blocks(blocks))
    again = bench.rollout(model, method, BANKS[bank])
    done = results[:kept]
    again.replay(torch.cat([result.latents for result in done], dim=1), [result.state for result in done])
    pairs = list(zip(again.blocks(blocks - kept), results[kept:], strict=True))
    differences = [float((a.latents - b.latents).abs().max()) for a, b in pairs]
    finite = all(bool(result.latents.isfinite().all()) for result in results)
    same = all(a.trace == b.trace for a, b in pairs)
    return bench.check(f"replay {method} {bank}", finite and same and max(differences) == 0, differences)


def _memory(bench: Bench) -> dict[str, Any] | str:
    """The second and third rollout of a process take what the first gave back."""
    if not bench.cuda:
        return "skipped: the CPU has no allocator of torch's to ask"
    model = bench.filled(CausalWanTransformer, bench.size.model)
    reserved = []
    for prompt in ("first", "second", "third"):
        rollout = bench.rollout(model, "rag", BANKS["host"], prompt)
        for _ in rollout.blocks(9):
            pass
        bench.wait()
        del rollout
        gc.collect()
        reserved.append(torch.cuda.memory_reserved(bench.device) / GIGA)
    return bench.check("memory", reserved[-1] - reserved[0] < 0.1 * reserved[0], {"reserved_gb": reserved})


def _few_each(layout: Layout) -> Tiers:
    """Three frames on the device, five in host memory, the rest in a file."""
    values = 2 * layout.num_layers * layout.tokens_per_frame * layout.num_heads * layout.head_dim
    frame = values * layout.dtype.itemsize
    return Tiers(device_bytes=3 * frame, host_bytes=5 * frame, disk=DISK)

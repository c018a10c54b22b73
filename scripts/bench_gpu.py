"""Measure a GPU with torch, NumPy and safetensors alone: its ceilings, the correctness of rollouts, and their speed.

Three calls of at most nine minutes each; parts that no longer fit are reported as skipped. Weights are random and drawn
on the device. Each call prints a table and, as its last line, one JSON object::

    PYTHONPATH=. python scripts/bench_gpu.py ceilings
    PYTHONPATH=. python scripts/bench_gpu.py correctness --golden ../shared/golden/rollout
    PYTHONPATH=. python scripts/bench_gpu.py table --out results.json

`--device cpu --size small` runs all of it in seconds without a GPU. The exit code is 1 if a part fails.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.context.base import BaseSettings
from lrag_ray.context.deep_forcing import DeepForcingSettings
from lrag_ray.context.policy import Layout
from lrag_ray.context.rag import RagSettings
from lrag_ray.context.registry import policy_class
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder, load_encoder
from lrag_ray.retrieval.history import HistoryBank, HostBank
from lrag_ray.retrieval.slabs import PAGE_LOCKED
from lrag_ray.rollout.noise import KeyedNoise, RecordedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.attention import attention
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.devices import DEVICES
from lrag_ray.wan.flops import block_flops
from lrag_ray.wan.rope import Rope, rotate
from lrag_ray.wan.transformer import CausalWanTransformer

GOLDEN_SIZES = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "num_heads", "num_layers")
GOLDEN_TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 0.1}
"""Largest difference of a latent from the golden float32 numbers of a CPU."""
VIDEO_FRAMES_PER_LATENT = 4
GIGA = 1e9


class Size(NamedTuple):
    """What is measured: the released model at 832x480, or one that a CPU computes in seconds."""

    model: WanConfig
    latent: tuple[int, int, int]
    encoder: EncoderConfig
    bytes_copied: int
    depths_s: tuple[int, ...]
    blocks: int
    """Blocks that are timed at each depth."""


SIZES = {
    "full": Size(WanConfig(), (16, 60, 104), EncoderConfig(), 1 << 30, (30, 60, 120), 6),
    "small": Size(
        WanConfig(dim=48, ffn_dim=64, freq_dim=16, text_dim=8, text_len=4, num_heads=4, num_layers=2),
        (16, 4, 6),
        EncoderConfig(16, 4, 6, 16, (8, 16)),
        1 << 20,
        (9, 12),
        2,
    ),
}
SAMPLER = SamplerConfig()
METHODS: Mapping[str, Any] = {
    "base": BaseSettings(),
    "infinity_rope": BaseSettings(),
    "deep_forcing": DeepForcingSettings(),
    "rag": RagSettings(encoder="random"),
}
BANKS: Mapping[str, Callable[[Layout], HistoryBank]] = {"host": lambda layout: HostBank(layout.device)}
"""Every storage type and tier of the history."""


@dataclass
class Bench:
    """One call: where and what, the time that is left, and the results so far."""

    device: torch.device
    size: Size
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to wait for."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of a run on this device."""
        return torch.bfloat16 if self.cuda else torch.float32

    def part(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure one part, unless the time is over; an error is a result and ends this part alone."""
        if time.monotonic() > self.deadline:
            self.results[name] = "skipped: the time of this call is over"
        else:
            began = time.monotonic()
            try:
                self.results[name] = measure()
            except Exception as error:  # noqa: BLE001 - the other parts are worth having
                self.results[name] = f"failed: {type(error).__name__}: {error}"
                self.failed.append(name)
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
            print(f"{name} ({time.monotonic() - began:.1f} s): {self.results[name]}", file=sys.stderr, flush=True)

    def check(self, name: str, good: bool, found: object) -> dict[str, Any]:
        """A result that is right or wrong."""
        if not good:
            self.failed.append(name)
        return {"pass": good, "found": found}

    def wait(self) -> None:
        """Until the device is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], repeats: int = 10) -> float:
        """Median seconds of `run` on the device, after two runs to warm up."""
        for _ in range(2):
            run()
        times = []
        for _ in range(repeats if self.cuda else 3):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers made on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def rollout(
        self, model: CausalWanTransformer, method: str, make_bank: Callable[[Layout], HistoryBank], prompt: str = "fox"
    ) -> Rollout:
        """A rollout of the random model with the released defaults."""
        config, settings = self.size.model, METHODS[method]
        generator = torch.Generator(self.device).manual_seed(1)
        text = torch.randn(1, config.text_len, config.text_dim, generator=generator, device=self.device)
        weights = {"encoder": self.filled(LatentAutoencoder, self.size.encoder).float()} if method == "rag" else {}
        noise = KeyedNoise(0, [prompt], [0], (SAMPLER.frames_per_block, *self.size.latent))
        policy = policy_class(method)
        return Rollout(
            model, SAMPLER, policy, settings, text, noise, self.size.latent, weights=weights, make_bank=make_bank
        )

    def filled(self, module: Callable[[Any], Any], config: object) -> Any:
        """A module with random weights drawn on the device, at scales that keep activations of order 1."""
        with torch.device("meta"):
            made = module(config)
        made = made.to_empty(device=self.device).to(self.dtype).eval().requires_grad_(False)
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in made.named_parameters():
            if parameter.dim() >= 2 and not name.endswith("modulation"):
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(name.endswith("norm.weight") or "norm_" in name, 0.1, generator=generator)
        return made


# 1. Versions and ceilings


def ceilings(bench: Bench, golden: Path | None) -> None:
    """What the machine could do."""
    bench.part("copy", lambda: _copy(bench))
    bench.part("matrix products", lambda: _products(bench))
    bench.part("bus", lambda: _bus(bench))
    bench.part("page-locking", lambda: _page_locking(bench))


def versions(device: torch.device) -> dict[str, Any]:
    """Of everything that the numbers depend on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "host_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIGA, 1),
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "device_gb": round(properties.total_memory / GIGA, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


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


# 2. Correctness


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
        found = torch.cat(bank.gather(wanted))
        wrong += [held for held, row in zip(wanted, found, strict=True) if not bool((row == held + 1).all())]
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


# 3. The table


def table(bench: Bench, golden: Path | None) -> None:
    """Where a pass spends its time, then blocks of every method at every depth."""
    bench.part("operations", lambda: _operations(bench))
    for depth_s in bench.size.depths_s:
        bench.part(f"depth {depth_s} s", lambda depth_s=depth_s: _depth(bench, depth_s))  # type: ignore[misc]
    bench.part("decode", lambda: _decode(bench))


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


def _depth(bench: Bench, depth_s: int) -> dict[str, dict[str, Any]]:
    """Blocks of all methods in turn, each rebuilt to just before the depth; FPS of video, without decoding."""
    model, n = bench.filled(CausalWanTransformer, bench.size.model), SAMPLER.frames_per_block
    before = max(5, round(depth_s * 16 / VIDEO_FRAMES_PER_LATENT) // n - bench.size.blocks)
    rollouts = {method: bench.rollout(model, method, lambda layout: _FewSlabs(layout.device)) for method in METHODS}
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


class _FewSlabs(HostBank):
    """A host bank whose frames share a few slabs: the costs of a long history in the memory of a short one."""

    def _place(self, frame: int, rows: Tensor) -> Tensor:
        """Over an older frame once there are a dozen."""
        older = self._rows.get(frame - 12)
        return super()._place(frame, rows) if older is None else older


def _decode(bench: Bench) -> dict[str, Any] | str:
    if importlib.util.find_spec("diffusers") is None:
        return "skipped: the VAE needs diffusers, which is not installed"
    from diffusers import AutoencoderKLWan

    from lrag_ray.wan.vae import WanVae

    vae: Any = AutoencoderKLWan() if bench.size is SIZES["full"] else AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    decoder = WanVae(vae.to(bench.device).eval().requires_grad_(False))
    latents = bench.draw(SAMPLER.frames_per_block, *bench.size.latent, dtype=torch.float32)
    seconds = bench.seconds(lambda: decoder.decode(latents), 5)
    return {"ms per block": 1e3 * seconds, "fps": len(latents) * VIDEO_FRAMES_PER_LATENT / seconds}


CALLS = {"ceilings": ceilings, "correctness": correctness, "table": table}


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a table for docs/performance.md."""
    lines = ["| part | what | result |", "|---|---|---|"]
    for part, found in results.items():
        rows = found.items() if isinstance(found, Mapping) else [("", found)]
        for what, value in rows:
            lines.append(f"| {part} | {what} | {_shown(value)} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one call, or all, and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=[*CALLS, "all"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=list(SIZES))
    parser.add_argument("--golden", type=Path, help="folder with golden rollouts, such as ../shared/golden/rollout")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part is begun after this time")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device. Fix: --device cpu --size small", file=sys.stderr)
        return 3
    device = torch.device("cuda", torch.cuda.current_device()) if asked.device == "cuda" else torch.device("cpu")
    bench = Bench(device, SIZES[asked.size], time.monotonic() + 60 * asked.minutes)
    with torch.no_grad():
        for name, call in CALLS.items():
            if asked.call in (name, "all"):
                call(bench, asked.golden)
    results = {"versions": versions(device), **bench.results}
    print(markdown(results))
    whole = json.dumps({"call": asked.call, "size": asked.size, "failed": bench.failed, "results": results})
    if asked.out is not None:
        asked.out.write_text(whole, encoding="utf-8")
    print(whole)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())

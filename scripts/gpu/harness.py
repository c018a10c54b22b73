"""What all calls of scripts/bench_gpu.py share: sizes, methods, the results so far, and how time is measured."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from lrag_ray.context.base import BaseSettings
from lrag_ray.context.deep_forcing import DeepForcingSettings
from lrag_ray.context.policy import Layout
from lrag_ray.context.rag import RagSettings
from lrag_ray.context.registry import policy_class
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.history import HistoryBank
from lrag_ray.rollout.noise import KeyedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.transformer import CausalWanTransformer

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
        """Median seconds of `run` on the device, after two runs to warm up; on a CPU of one run, after one."""
        for _ in range(2 if self.cuda else 1):
            run()
        times = []
        for _ in range(repeats if self.cuda else 1):
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
        self, model: CausalWanTransformer, method: str, make_bank: Callable[[Layout], HistoryBank], *prompts: str
    ) -> Rollout:
        """A rollout of the random model with the released defaults; of several prompts, rows of the same passes."""
        prompts = prompts or ("fox",)
        config, settings = self.size.model, METHODS[method]
        generator = torch.Generator(self.device).manual_seed(1)
        text = torch.randn(len(prompts), config.text_len, config.text_dim, generator=generator, device=self.device)
        weights = {"encoder": self.filled(LatentAutoencoder, self.size.encoder).float()} if method == "rag" else {}
        noise = KeyedNoise(0, prompts, [0] * len(prompts), (SAMPLER.frames_per_block, *self.size.latent))
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

"""Loads a generator and runs blocks of a rollout in a process of its own, and says what that took.

    python -m tests.full_size.load_and_run CHECKPOINT WIDTHS BLOCKS [LORA]

WIDTHS is a JSON object of WanConfig fields. The last line of output is one JSON object; memory is that of /proc:
anonymous memory is what the process holds of its own, file memory is the mapped checkpoint, which the kernel shares
between actors and may drop.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from pathlib import Path

import torch

from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.rollout.noise import KeyedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.lora import Lora

LATENT = (16, 8, 8)


def memory_bytes() -> dict[str, int]:
    """Anonymous and file-mapped resident memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("anon", "RssAnon"), ("file", "RssFile"))}


class Peak:
    """Highest anonymous memory while the block runs, sampled 50 times a second."""

    def __enter__(self) -> Peak:
        self.anon = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.anon = max(self.anon, memory_bytes()["anon"])
            if self._ended.wait(0.02):
                return


def main(path: str, widths: str, blocks: str, lora: str | None = None) -> None:
    config = WanConfig(**json.loads(widths))
    before = memory_bytes()
    read_before, disk_before = _io_bytes("rchar"), _io_bytes("read_bytes")
    began = time.perf_counter()
    with Peak() as loading:
        merged = Lora(lora) if lora is not None else None
        model = load_transformer(path, config, use_ema=True, dtype=torch.bfloat16, lora=merged)
    loaded, loaded_s = memory_bytes(), time.perf_counter() - began
    read_bytes = _io_bytes("rchar") - read_before
    noise = KeyedNoise(0, ["p"], [0], (3, *LATENT))
    embeds = torch.randn(1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    with Peak() as running:
        rollout = Rollout(model, SamplerConfig(), InfinityRope, InfinityRope.Settings(), embeds, noise, LATENT)
        latents = torch.cat([result.latents for result in rollout.blocks(int(blocks))], dim=1)
    print(
        json.dumps(
            {
                "load_s": round(loaded_s, 2),
                "load_anon_bytes": loaded["anon"] - before["anon"],
                "load_peak_anon_bytes": loading.anon - before["anon"],
                "load_read_call_bytes": read_bytes,
                "disk_read_bytes": _io_bytes("read_bytes") - disk_before,
                "run_s": round(time.perf_counter() - began, 2),
                "run_peak_anon_bytes": running.anon - before["anon"],
                "file_bytes": memory_bytes()["file"] - before["file"],
                "shape": list(latents.shape),
                "finite": bool(latents.isfinite().all()),
                "digest": hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
            }
        )
    )


def _io_bytes(counter: str) -> int:
    """``rchar``: what read() calls brought into this process; ``read_bytes``: what came from the disk, mapped too."""
    return int(Path("/proc/self/io").read_text().split(f"{counter}:")[1].split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The text encoder at its released size (5.7 billion parameters, 11.4 GB in bf16): mapped, held once, and it encodes.

Writes twice the size of the file and takes minutes: RUN_SLOW=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.text import UMT5Sizes
from tests.conftest import REPOSITORY

_PROGRAM = """
import json, sys, time
from tests.full_size.load_and_run import Peak, memory_bytes
from lrag_ray.wan.text import TextEncoder, mapped_text_encoder
before, began = memory_bytes(), time.perf_counter()
with Peak() as loading:
    model = mapped_text_encoder(sys.argv[1])
loaded_s = time.perf_counter() - began
began = time.perf_counter()
with Peak() as running:
    (rows,) = TextEncoder(model, lambda text: [ord(letter) for letter in text], "letters").encode(["a red fox"])
print(json.dumps({
    "load_s": round(loaded_s, 2),
    "load_peak_anon_bytes": loading.anon - before["anon"],
    "encode_s": round(time.perf_counter() - began, 2),
    "encode_peak_anon_bytes": running.anon - before["anon"],
    "parameters": sum({p.data_ptr(): p.numel() for p in model.parameters()}.values()),
    "dtype": str(rows.dtype),
    "shape": list(rows.shape),
    "finite": bool(rows.isfinite().all()),
    "spread": float(rows.float().std()),
}))
"""


def original_shapes(sizes: UMT5Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``models_t5_umt5-xxl-enc-bf16.pth``."""
    dim, inner, ffn = sizes.dim, sizes.num_heads * sizes.head_dim, sizes.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (sizes.vocab_size, dim), "norm.weight": (dim,)}
    for layer in range(sizes.num_layers):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.norm{i}.weight": (dim,) for i in (1, 2)}
        shapes |= {f"{block}.attn.{name}.weight": (inner, dim) for name in "qkv"}
        shapes[f"{block}.attn.o.weight"] = (dim, inner)
        shapes |= {f"{block}.ffn.{name}.weight": (ffn, dim) for name in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = (dim, ffn)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, sizes.num_heads)
    return shapes


def write_original(path: Path, sizes: UMT5Sizes) -> int:
    """A file of the original format with random bf16 weights, never held in memory; returns its bytes."""
    shapes = original_shapes(sizes)
    scratch = path.with_suffix(".raw")
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    flat = torch.from_file(str(scratch), shared=True, size=total, dtype=torch.bfloat16)
    state: dict[str, Tensor] = {}
    offset = 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        scale = 1.0 if "norm" in name or "token" in name else shape[-1] ** -0.5
        flat[offset : offset + count].normal_(0, scale, generator=keyed_generator("text", name))
        # A storage of its own per tensor, as the released file has it.
        state[name] = flat[offset : offset + count].view(shape)
        offset += count
    torch.save(state, path)
    scratch.unlink()
    return 2 * total


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="11.4 GB of weights: set RUN_SLOW=1")
def test_the_full_text_encoder_is_mapped_and_encodes(tmp_path: Path) -> None:
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    weight_bytes = write_original(path, UMT5Sizes())
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    path.unlink()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print("\n", weight_bytes, result)
    assert result["parameters"] == weight_bytes // 2
    assert (result["dtype"], result["shape"], result["finite"]) == ("torch.bfloat16", [9, 4096], True)
    assert result["spread"] > 0.1
    # Most of it is transformers itself, which is imported on the way.
    assert result["load_peak_anon_bytes"] < 300e6, "what has the right dtype stays mapped to the file"
    assert result["encode_peak_anon_bytes"] < 500e6, "features of a prompt need no second copy of the weights"

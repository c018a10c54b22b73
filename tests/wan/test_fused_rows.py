"""The fused kernel: its values under Triton's interpreter, its code for GPUs that are not here, and going without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrag_ray.wan import fused_rows
from lrag_ray.wan.devices import kernel_notes
from lrag_ray.wan.kernel_trial import TOLERANCE
from lrag_ray.wan.kernels import Kernels

pytest.importorskip("triton")
REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_kernel_computes_what_the_plain_operations_do() -> None:
    """Given the rounding of the interpreter, bfloat16 is equal bit for bit; float32 differs by the order of a sum.

    Pixels of a whole decode are no more than twice as far from those in float32 as without the kernel.
    """
    found = subprocess.run(
        [sys.executable, "-m", "tests.wan.interpreted_rows"],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    cases = json.loads(found.stdout.splitlines()[-1])
    assert len(cases) == 27
    for name, compared in cases.items():
        for what, (apart, share) in compared.items():
            if name.startswith("decoded"):
                assert apart < max(2 * compared["plain"][0], TOLERANCE[torch.float32]) < 0.01, (name, what)
            elif name.startswith("rounded"):
                assert share == 0, (name, what)
            elif name.startswith(("bfloat16", "float16")):
                assert share < 0.01, (name, what)
            else:
                assert apart < TOLERANCE[torch.float32], (name, what)


def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, constants and instructions are checked by the compiler; bfloat16 is rounded to the nearest."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lrag_ray.wan.fp8_kernel import round_kernel
    from lrag_ray.wan.fused_kernel import rows_kernel
    from lrag_ray.wan.norm_silu_kernel import norm_silu_kernel
    from lrag_ray.wan.residual_kernel import residual_norm_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    others = {"turns": "*fp32", "eps": "fp32", "scales": "*fp32", "values": "*fp8e4nv"}
    others |= dict.fromkeys(("largest", "least", "gain"), "fp32")
    others |= dict.fromkeys(("rows", "width", "pairs", "turns_stride", "out_stride", "rows_per_frame"), "i32")
    others |= dict.fromkeys(("gate_stride", "shift_stride", "scale_stride"), "i32")
    steps = dict.fromkeys(("ADDS", "GATES", "NORMS", "MODULATES"), True)
    for kernel, constants, rounds in (
        (rows_kernel, {"KEEP": True, "BLOCK": 1024}, "cvt.rn.bf16"),
        (residual_norm_kernel, steps | {"BLOCK": 2048}, "cvt.rn.bf16"),
        (norm_silu_kernel, {"ADDS": True, "ROWS": 16, "BLOCK": 128}, "cvt.rn.bf16"),
        (round_kernel, {"BLOCK": 2048}, "cvt.rn.satfinite.e4m3x2.f32"),
    ):
        types = others | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: types.get(name, "*bf16") for name in kernel.arg_names}, constants)
        code = compiled(source, target=GPUTarget("cuda", 90, 32)).asm
        assert code["cubin"]
        assert rounds in code["ptx"] and "cvt.rz" not in code["ptx"]


def test_a_device_without_triton_does_without_the_kernel_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    on = Kernels()
    assert not fused_rows.fuses(on, cpu) and fused_rows.notes(on, cpu) == []
    # As a GPU whose kernel does not compile: the kernel was loaded for a GPU, and is given tensors of the CPU.
    from lrag_ray.wan import fused_kernel  # noqa: F401

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not fused_rows.fuses(on, cpu)
    (note,) = fused_rows.notes(on, cpu)
    assert note.startswith("plain operations in place of the fused kernel, which is slower: ")
    assert fused_rows.notes(Kernels(fused_rows=False), cpu) == []
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernel_notes(on, cpu) == []
    (note,) = kernel_notes(Kernels(fused_layers=True), cpu)
    assert note == "plain operations in place of engine.fused_layers: it runs on GPUs alone"

"""scripts/bench_gpu.py, which must work the first time on a card: all of it, small, on the CPU."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu.harness import SIZES, Bench
from scripts.gpu.scoring import scoring
from scripts.gpu.table import _decode, _decode_beside

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_gpu.py"
REFUSED = (
    *("ray", "pydantic", "diffusers", "transformers", "yaml", "av", "typer", "rich", "pyarrow", "torchvision"),
    *("vbench", "pyiqa"),
)


def test_every_call_runs_with_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    program = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {REFUSED!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {REFUSED!r} else found(name, *rest)
sys.argv = ["bench_gpu.py", "all", "--device", "cpu", "--size", "small", "--out", {str(tmp_path / "out.json")!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    # One thread: small operations on a busy machine wait longer for a second one than they take.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout.splitlines()[-1])
    assert whole == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    results = whole["results"]
    assert whole["failed"] == []
    for method in ("base", "infinity_rope", "deep_forcing", "rag"):
        assert results[f"replay {method}, bank host"]["pass"], method
        assert results["depth 12 s"][method]["fps"] > 0, method
    for bank in ("host", "device", "all tiers", "bf16", "int8", "int4", "int8_hadamard", "int4_hadamard"):
        assert results[f"bank {bank}"]["pass"], bank
        assert results[f"replay rag, bank {bank}"]["pass"], bank
    assert results["operations"]["self-attention"]["tflops"] > 0
    assert all(results["prompts per pass"][rows]["ms per block and prompt"] > 0 for rows in ("1 prompt", "2 prompts"))
    assert results["fp8 products"]["fp8"]["ms per block"] > 0 and results["fp8 products"]["latent rms"] > 1e-3
    for network in ("DINO", "DINOv2", "CLIP B/32", "CLIP L/14"):
        assert results[f"scoring {network}"]["2 at once"]["ms per frame"] > 0, network
    kernels = results["kernels"]
    assert all(kernels[name]["ms"] > 0 for name in ("flash", "math", "plain rows"))
    assert "runs on GPUs alone" in kernels["cudnn"] and kernels["fused rows"] == "runs on GPUs alone"
    skipped = {name for name, found in results.items() if isinstance(found, str)}
    assert skipped == {
        "bus",
        "page-locking",
        "goldens float32",
        "goldens bfloat16",
        "memory of rollouts in a row",
        "fused layers",
        "decode",
        "decode beside rag",
        "scoring MUSIQ",
        "scoring RAFT",
        "scoring AMT-S",
    }


def test_networks_of_public_packages_are_measured_where_these_are_installed() -> None:
    """Given random weights, a batch of two."""
    pytest.importorskip("vbench")
    bench = Bench(torch.device("cpu"), SIZES["small"], math.inf)
    with torch.no_grad():
        scoring(bench)
    assert bench.failed == []
    for network, unit in (("MUSIQ", "frame"), ("RAFT", "pair"), ("AMT-S", "pair")):
        found = bench.results[f"scoring {network}"]
        assert found["2 at once"][f"ms per {unit}"] > 0


def test_decoding_is_measured_alone_and_beside_a_rollout_where_diffusers_is_installed() -> None:
    bench = Bench(torch.device("cpu"), SIZES["small"], math.inf)
    with torch.no_grad():
        alone, beside = _decode(bench), _decode_beside(bench)
    assert isinstance(alone, dict) and isinstance(beside, dict)
    measured = {name: found for name, found in alone.items() if not name.endswith("fused norm")}
    assert {found for name, found in alone.items() if name not in measured} == {"it runs on GPUs alone"}
    assert len(measured) == 6 and len(alone) == 9
    assert alone["float32"]["psnr_db"] is None and alone["bfloat16"]["psnr_db"] > 20
    assert list(beside) == ["no decoding", "float32", "bfloat16, channels last"]
    assert all(each["fps"] > 0 for each in (*measured.values(), *beside.values()))


def test_a_part_that_no_longer_fits_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["table", "--size", "small", "--device", "cpu", "--minutes", "0"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert results["operations"] == "skipped: the time of this call is over"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_path(str(SCRIPT))["main"](["ceilings"]) == 3
    assert "--device cpu --size small" in capsys.readouterr().err

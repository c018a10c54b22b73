"""scripts/bench_gpu.py, which must work the first time on a card: all of it, small, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_gpu.py"
REFUSED = ("ray", "pydantic", "diffusers", "transformers", "yaml", "av", "typer", "rich", "pyarrow", "torchvision")


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout.splitlines()[-1])
    assert whole == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    results = whole["results"]
    assert whole["failed"] == []
    for method in ("base", "infinity_rope", "deep_forcing", "rag"):
        assert results[f"replay {method}, bank host"]["pass"], method
        assert results["depth 12 s"][method]["fps"] > 0, method
    assert results["bank host"]["pass"]
    assert results["operations"]["self-attention"]["tflops"] > 0
    skipped = {name for name, found in results.items() if isinstance(found, str)}
    assert skipped == {
        "bus",
        "page-locking",
        "goldens float32",
        "goldens bfloat16",
        "memory of rollouts in a row",
        "decode",
    }


def test_a_part_that_no_longer_fits_is_skipped_and_a_wrong_device_is_refused() -> None:
    small = [sys.executable, str(SCRIPT), "table", "--size", "small"]
    late = subprocess.run([*small, "--device", "cpu", "--minutes", "0"], capture_output=True, text=True, check=True)
    results = json.loads(late.stdout.splitlines()[-1])["results"]
    assert results["operations"] == "skipped: the time of this call is over"

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
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.gpu.ceilings import ceilings
from scripts.gpu.correctness import correctness
from scripts.gpu.harness import SIZES, Bench, versions
from scripts.gpu.table import table

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

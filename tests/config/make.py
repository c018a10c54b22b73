"""Configuration files for the tests."""

from __future__ import annotations

from pathlib import Path

SMALL = """\
job: evaluate
run: {uri: runs/small}
prompts: {path: prompts.txt}
durations_s: [4.5, 9]
backbones:
  tiny: {preset: tiny}
methods:
  base: {}
  rag: {descriptor: avg_pool}
engine: {actors: 2}
"""


def write(folder: Path, text: str = SMALL, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)

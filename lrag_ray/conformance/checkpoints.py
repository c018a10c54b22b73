"""Golden checkpoint files: those that fit must load bit for bit, those that do not must be refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet, one_line
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors
from lrag_ray.conformance.recording import wan_config
from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.names import bare_name
from lrag_ray.wan.state_dict import read_checkpoint

EXACT = Bound()


def cases(folder: Folder) -> list[GoldenCase]:
    """A case per checkpoint file beside a JSON that says what the public loader did with each."""
    found = []
    for record in folder.records:
        if not record.holds("model", "variants"):
            continue
        expected = [file for file in folder.vectors if file.named("generator.") or file.named("ema.")]
        paths = folder.torch_files + [file.path for file in folder.vectors if _variant(file.path, record)]
        for path in paths:
            found.append(GoldenCase(path.stem, partial(_check, record, expected[0] if expected else None, path)))
        on_disk = {_variant(path, record) for path in paths}
        for name in record.content["variants"].keys() - on_disk:
            found.append(GoldenCase(name, partial(_check_absent, name)))
    return found


def _check_absent(name: str, sheet: Sheet) -> None:
    sheet.add("file", "skip", f"no checkpoint file of the variant '{name}'")


def _variant(path: Path, record: CaseRecord) -> str | None:
    """Variant that a file belongs to: the longest name that its stem ends with."""
    fitting = [name for name in record.content["variants"] if path.stem == name or path.stem.endswith(f"_{name}")]
    return max(fitting, key=len, default=None)


def _check(record: CaseRecord, expected: Vectors | None, path: Path, sheet: Sheet) -> None:
    if expected is None:
        sheet.add("weights", "fail", "no safetensors file with the expected weights is beside the checkpoints")
        return
    name = _variant(path, record)
    outcomes = record.content["variants"][name]["upstream_loader"] if name else {}
    for use_ema in (False, True):
        label = f"use_ema={str(use_ema).lower()}"
        try:
            transformer = load_transformer(
                path, wan_config(record.content["model"]), use_ema=use_ema, dtype=torch.float32
            )
        except WeightsError as refusal:
            said = one_line(refusal).replace(str(path), path.name)
            _judge_refusal(label, outcomes.get(label, ""), said, sheet)
            continue
        wanted = _wanted(outcomes.get(label, ""), path, use_ema, expected)
        if wanted is None:
            sheet.add(label, "fail", "was loaded, but it must be refused: it does not fit the model")
            continue
        ours = transformer.state_dict()
        sheet.same(f"{label} names", sorted(ours), sorted(wanted))
        sheet.close_all(label, {key: (ours[key], wanted[key], EXACT) for key in ours.keys() & wanted.keys()})


def _judge_refusal(label: str, outcome: str, refusal: str, sheet: Sheet) -> None:
    """A refusal is right unless the public loader had a complete result."""
    if _result(outcome) is not None:
        sheet.add(label, "fail", f"was refused: {refusal}")
    elif not re.search(r"\bFix: ", refusal):
        sheet.add(label, "fail", f"was refused without a fix: {refusal}")
    else:
        sheet.add(label, "pass", f"refused: {refusal}")


def _result(outcome: str) -> str | None:
    """Which weights the public loader ended with: ``generator``, ``ema``, or None where it failed or left gaps."""
    for name in ("generator", "ema"):
        if f"result = {name} weights" in outcome:
            return name
    return None


def _wanted(outcome: str, path: Path, use_ema: bool, expected: Vectors) -> dict[str, Tensor] | None:
    """Weights that must come out, or None if the file must be refused.

    Where the public loader refused, only names that it did not clean may be the reason: then the file is complete.
    """
    result = _result(outcome)
    if result is None:
        content: Mapping[str, Any] = read_checkpoint(path)
        held = content.get("generator_ema" if use_ema else "generator", content.get("model"))
        if held is None and all(isinstance(value, Tensor) for value in content.values()):
            # Tensors without a top level are one generator, which the public loader does not know.
            held = content
        shapes = {bare_name(str(name)): tuple(value.shape) for name, value in (held or {}).items()}
        result = "ema" if use_ema and "generator_ema" in content else "generator"
        if shapes != {name: expected.shapes[f"{result}.{name}"] for name in expected.named(f"{result}.")}:
            return None
    weights = expected.group(f"{result}.")
    if rounded := re.search(r"rounded to (bfloat16|float16)", outcome):
        weights = {name: value.to(getattr(torch, rounded[1])).float() for name, value in weights.items()}
    return weights

"""Golden vectors of the flow-matching schedule."""

from __future__ import annotations

import json
from functools import partial

import torch

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors, pair
from lrag_ray.wan.schedule import TRAIN_TIMESTEPS, FlowMatchSchedule

RELATIVE = Bound(relative=1e-6)
IMPLEMENTED = {"sigma_min": 0.0, "sigma_max": 1.0, "extra_one_step": True, "num_train_timesteps": TRAIN_TIMESTEPS}
"""Settings that `FlowMatchSchedule` has built in."""


def cases(folder: Folder) -> list[GoldenCase]:
    """A case per JSON with a shift and its tables."""
    records = [record for record in folder.records if record.holds("shift") and not record.holds("model")]
    tables = [vectors for vectors in folder.vectors if vectors.has("sigmas", "timesteps")]
    return [GoldenCase(case.stem, partial(_check, case.record, case.vectors)) for case in pair(records, tables)]


def _check(record: CaseRecord | None, vectors: Vectors | None, sheet: Sheet) -> None:
    if record is None:
        sheet.add("settings", "fail", "no JSON with the shift is beside the tables")
        return
    settings = record.content
    for name, ours in IMPLEMENTED.items():
        if settings.get(name, ours) != ours:
            sheet.add(name, "fail", f"the vectors use {settings[name]}, the schedule is built for {ours}")
            return
    schedule = FlowMatchSchedule(float(settings["shift"]))
    for steps, golden in settings.get("warped", {}).items():
        sheet.close(f"warped {steps}", torch.tensor(schedule.warp(json.loads(steps))), torch.tensor(golden), RELATIVE)
    _check_ends(settings, schedule, sheet)
    if vectors is None:
        sheet.add("tables", "skip", "no safetensors file with tables is beside the JSON")
        return
    for name in ("sigmas", "timesteps", "training_weights"):
        if name in vectors:
            sheet.close(name, getattr(schedule, name), vectors[name], _bound(name, vectors))
    if "t" in vectors:
        _check_samples(vectors, schedule, sheet)


def _check_ends(settings: dict[str, list[float]], schedule: FlowMatchSchedule, sheet: Sheet) -> None:
    """First and last entries that the JSON repeats from the tables."""
    for name in ("sigmas", "timesteps"):
        table = getattr(schedule, name)
        for key, ours in ((f"first5_{name}", table[:5]), (f"last5_{name}", table[-5:])):
            if key in settings:
                sheet.close(key, ours, torch.tensor(settings[key]), RELATIVE)


def _check_samples(vectors: Vectors, schedule: FlowMatchSchedule, sheet: Sheet) -> None:
    """Conversions at the timesteps `t`; each starts from golden inputs, so that errors do not add up."""
    t = vectors["t"]
    if "timestep_index" in vectors:
        golden = vectors["timestep_index"]
        sheet.close("timestep_index", schedule.timestep_index(t).to(golden.dtype), golden, Bound())
    if "sigma_used" in vectors:
        sheet.close("sigma_used", schedule.sigma(t), vectors["sigma_used"], RELATIVE)
    if "training_weight_at_t" in vectors:
        bound = _bound("training_weights", vectors)
        sheet.close("training_weight_at_t", schedule.training_weight(t), vectors["training_weight_at_t"], bound)
    if not vectors.has("x0", "noise", "flow", "add_noise"):
        return
    x0, noise, flow, x_t = (vectors[name] for name in ("x0", "noise", "flow", "add_noise"))
    half = torch.bfloat16
    ours = {
        "add_noise": schedule.add_noise(x0, noise, t),
        "x0_from_flow": schedule.x0_from_flow(flow, x_t, t),
        "flow_from_x0": schedule.flow_from_x0(x0, x_t, t),
        "add_noise_bf16": schedule.add_noise(x0.to(half), noise.to(half), t).float(),
        "x0_from_flow_bf16": schedule.x0_from_flow(flow.to(half), x_t.to(half), t).float(),
    }
    for name, converted in ours.items():
        if name in vectors:
            golden = vectors[name]
            # A difference of two large values may be small; its rounding is relative to them. bf16 is bit for bit.
            bound = Bound() if name.endswith("_bf16") else Bound(absolute=1e-6 * float(golden.abs().max()))
            sheet.close(name, converted, golden, bound)


def _bound(name: str, vectors: Vectors) -> Bound:
    """Training weights end at 0 after a subtraction, so they are relative to the largest one."""
    if name != "training_weights":
        return RELATIVE
    table = vectors[name] if name in vectors else vectors["training_weight_at_t"]
    return Bound(absolute=1e-6 * float(table.abs().max()))

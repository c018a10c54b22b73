"""Golden rollouts in the format of golden/rollout: native or retrieval-augmented, any sizes and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors, pair
from lrag_ray.conformance.recording import CPU, Recording, golden_transformer, record, wan_config, with_local_weights
from lrag_ray.conformance.stored_history import check_stored_history, keeps_history
from lrag_ray.context.rag import Rag
from lrag_ray.context.trace import TraceRow
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.retrieval.encoder import load_encoder
from lrag_ray.retrieval.similarity import Descriptor, average_pool
from lrag_ray.wan.config import SamplerConfig

LATENTS = Bound(absolute=5e-5)
TIMESTEPS = Bound(relative=1e-6)

_PASS = re.compile(r"debug\.block(?P<block>\d+)\.(?P<step>step\d+|context)\.(?P<value>flow|x0)")
_LATE = re.compile(
    r"debug\.late\.(?P<step>step\d+|context)\.layer(?P<layer>\d+)\.(?P<rows>query_roped|key_roped|value)"
)


def cases(folder: Folder, bank: BankType | None = None, device: torch.device = CPU) -> list[GoldenCase]:
    """A case per JSON with case settings and a model, and its tensors, computed on `device`; `bank` judges histories
    stored so instead."""
    records = [record for record in folder.records if record.holds("case", "model")]
    vectors = [file for file in folder.vectors if file.has("noise", "output", "prompt_embeds")]
    return [
        GoldenCase(case.stem, partial(_check, folder, case.record, case.vectors, bank=bank, device=device))
        for case in pair(records, vectors)
    ]


class _Plan(NamedTuple):
    """A case's settings in our terms."""

    sampler: SamplerConfig
    method: str
    settings: dict[str, Any]


def _plan(case: Mapping[str, Any], folder: Folder) -> _Plan:
    # What a case leaves out has the default of the public generator wrapper.
    model = case["model_kwargs"]
    sampler = SamplerConfig(
        denoising_steps=tuple(case["denoising_step_list"]),
        warp=case.get("warp", True),
        shift=model.get("timestep_shift", 8.0),
        context_timestep=float(case.get("context_noise", 0)),
        frames_per_block=case["num_frame_per_block"],
    )
    settings: dict[str, Any] = {"window": model.get("local_attn_size", -1), "sink": model.get("sink_size", 0)}
    if not model.get("use_latentmem", False):
        return _Plan(sampler, "base", settings)
    settings |= {"top_k": model.get("memory_size", 0), "recent_exclude": model.get("recent_exclude", 0)}
    settings |= {"descriptor": model.get("compression_method", "avg_pool"), "admission": "cache"}
    if settings["descriptor"] == "ae":
        settings["encoder"] = model.get("ae_ckpt")
    return _Plan(sampler, "rag", with_local_weights("rag", settings, folder))


def _check(
    folder: Folder,
    golden_record: CaseRecord | None,
    vectors: Vectors | None,
    sheet: Sheet,
    *,
    bank: BankType | None = None,
    device: torch.device = CPU,
) -> None:
    if golden_record is None or vectors is None:
        sheet.add("files", "fail", "a case needs a JSON with case and model and a safetensors file with its tensors")
        return
    golden = golden_record.content
    case = golden["case"]
    plan = _plan(case, folder)
    late = [match for name in vectors.shapes if (match := _LATE.fullmatch(name))]
    steps = len(plan.sampler.denoising_steps)
    places = {(case.get("late_block"), _pass(match["step"], steps), int(match["layer"])) for match in late}
    noise = vectors["noise"][:, : case.get("frames")]
    blocks, n = noise.shape[1] // plan.sampler.frames_per_block, plan.sampler.frames_per_block
    no_draws = torch.empty(blocks, steps - 1, noise.shape[0] * n, *noise.shape[2:])
    roll_out = partial(
        record,
        golden_transformer(folder.path / case["model_weights"], wan_config(golden["model"]), device),
        plan.sampler,
        plan.method,
        plan.settings,
        vectors["prompt_embeds"],
        noise,
        vectors["renoise"] if "renoise" in vectors or steps > 1 else no_draws,
    )
    if bank is not None:
        if keeps_history(plan.method, plan.settings, n, sheet):
            check_stored_history(lambda kind: roll_out(bank=kind), vectors["output"], bank, sheet)
        return
    recording = roll_out(wanted=lambda *place: place in places)
    sheet.close("output", recording.latents, vectors["output"], LATENTS)
    if "timesteps" in golden:
        ours = torch.tensor(recording.timesteps[-1][:-1])
        sheet.close("timesteps", ours, torch.tensor(golden["timesteps"]), TIMESTEPS)
    _check_passes(recording, vectors, steps, sheet)
    _check_late(recording, vectors, case.get("late_block"), steps, sheet)
    if "descriptors" in vectors:
        _check_descriptors(recording, vectors["descriptors"], plan, sheet)
    if "memory_indices_log" in golden:
        _check_retrieval(recording, golden["memory_indices_log"], n, sheet)
    if "attention_map" in golden:
        _check_attention_map(recording, golden["attention_map"], sheet)


def _pass(name: str, steps: int) -> int:
    """Number of a pass: ``step2`` is 2, ``context`` comes after the denoising passes."""
    return steps if name == "context" else int(name.removeprefix("step"))


def _check_passes(recording: Recording, vectors: Vectors, steps: int, sheet: Sheet) -> None:
    for value, ours in (("flow", recording.flow), ("x0", recording.x0)):
        pairs = {}
        for name in vectors.shapes:
            match = _PASS.fullmatch(name)
            if match and match["value"] == value:
                place = int(match["block"]), _pass(match["step"], steps)
                pairs[name] = (ours[place], vectors[name], LATENTS)
        sheet.close_all(f"debug {value}", pairs)


def _check_late(recording: Recording, vectors: Vectors, block: int, steps: int, sheet: Sheet) -> None:
    for rows, field in (("query_roped", "q"), ("key_roped", "k"), ("value", "v")):
        pairs = {}
        for name in vectors.shapes:
            match = _LATE.fullmatch(name)
            if match and match["rows"] == rows:
                attended = recording.attended[block, _pass(match["step"], steps), int(match["layer"])]
                pairs[name] = (getattr(attended, field), vectors[name], LATENTS)
        sheet.close_all(f"late {rows}", pairs)


def _check_descriptors(recording: Recording, golden: Tensor, plan: _Plan, sheet: Sheet) -> None:
    """Those that the policy kept, or, where nothing is ever retrieved, those of our latents."""
    describe: Descriptor = average_pool
    if plan.settings.get("encoder"):
        describe = load_encoder(plan.settings["encoder"]).encode
    ours = [
        policy.index.descriptors() if isinstance(policy, Rag) and len(policy.index) else describe(latents)
        for policy, latents in zip(recording.policies, recording.latents, strict=True)
    ]
    sheet.close("descriptors", torch.stack(ours), golden, LATENTS)


def _check_retrieval(recording: Recording, log: list[Mapping[str, Any]], n: int, sheet: Sheet) -> None:
    """Which frames were retrieved, best first, in every block: an entry per retrieving block, none for the others."""
    golden = {entry["query_frame"] // n: entry for entry in log}
    frames, similarities, ours, theirs = [], [], [], []
    for block, elements in enumerate(recording.trace):
        retrieved = [[row for row in rows if row.kind == "retrieved"] for rows in elements]
        entry = golden.get(block, {})
        frames.append([[row.frame for row in rows] for rows in retrieved])
        theirs.append(entry.get("selected_global_frames", [[] for _ in elements]))
        similarities += [row.similarity for rows in retrieved for row in rows]
        ours += [value for values in entry.get("selected_similarities", []) for value in values]
    sheet.same("retrieved frames", frames, theirs)
    if frames == theirs and ours:
        sheet.close("retrieved similarities", torch.tensor(similarities), torch.tensor(ours), LATENTS)
    pool = [entry["num_evicted"] for entry in log if "num_evicted" in entry]
    policy = recording.policies[0]
    if pool and isinstance(policy, Rag):
        sheet.same("history size", [policy.settings.history(entry["query_frame"], n) for entry in log], pool)


def _check_attention_map(recording: Recording, golden: list[Mapping[str, Any]], sheet: Sheet) -> None:
    """Frames, temporal indices and parts of the context that every block attends to, in order."""
    ours, theirs = [], []
    for entry in golden:
        block = entry["block"]
        elements = range(len(entry["keys_all_passes"]))
        ours.append([[_entry(row) for row in recording.rows(block, element, 0)] for element in elements])
        theirs.append([[_golden_entry(*key) for key in keys] for keys in entry["keys_all_passes"]])
    sheet.same("attention map", ours, theirs)
    queries = [recording.query_indices[entry["block"]] for entry in golden]
    sheet.same("query indices", queries, [[entry["query_rope"]] * len(recording.policies) for entry in golden])


def _entry(row: TraceRow) -> tuple[str, int, int]:
    return row.kind, row.frame, row.temporal_index


def _golden_entry(group: str, frame: int, temporal_index: int, kind: str) -> tuple[str, int, int]:
    """The golden map calls the block's own frames ``sink`` where they will be."""
    part = "current" if kind == "current" else {"memory": "retrieved"}.get(group, group)
    return part, frame, temporal_index

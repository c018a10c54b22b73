"""Golden rollouts in the format of golden/methods: all context methods on shared inputs stored near the cases.

Compared are latents, predictions, the final cache, the attended rows and Deep Forcing's selections. The scores behind
those selections are not: a different choice shows, an equal one needs no further proof.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors, case_stem, pair
from lrag_ray.conformance.recording import (
    Recording,
    generator_files,
    golden_transformer,
    record,
    wan_config,
    with_local_weights,
)
from lrag_ray.conformance.stored_cache import check_stored_cache
from lrag_ray.conformance.token_rows import TokenRows, token_rows
from lrag_ray.context.deep_forcing import DeepForcing
from lrag_ray.errors import UsageError
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.schedule import FlowMatchSchedule

LATENTS = Bound(absolute=1e-4)
TIMESTEPS = Bound(relative=1e-6)
LEVELS_UP = 3
"""How far above a case its inputs are looked for."""

SETTING_NAMES = {"K": "top_k", "R": "recent_exclude", "history_admission": "admission", "ae_ckpt": "encoder"}
"""Golden settings that we call otherwise."""
NOT_SETTINGS = {"method", "frames_per_block", "frames", "optional"}
"""Entries of the golden settings that are not the policy's."""

_SELECTED = re.compile(r"pc\.block(\d+)\.layer(\d+)\.selected_aug_index")
_TOKENS = re.compile(r"ctx\.block(\d+)\.pass(\d+)\.layer(\d+)\.(origin_token|temporal_index)")


def cases(folder: Folder) -> list[GoldenCase]:
    """A case per JSON with the settings of a method, and its latents."""
    records = [r for r in folder.records if r.holds("settings") and "method" in r.content["settings"]]
    vectors = [file for file in folder.vectors if "latents" in file]
    return [
        GoldenCase(case.stem, partial(_check, folder, case.record, case.vectors)) for case in pair(records, vectors)
    ]


class Inputs(NamedTuple):
    """What all cases of a set share."""

    config: WanConfig
    sampler: Mapping[str, Any]
    weights: Path
    tensors: Vectors


def find_inputs(folder: Path, latents: tuple[int, ...]) -> Inputs:
    """Model, sampler, weights and noise for latents of a shape, in the folder, above it or beside those above it.

    Raises UsageError where no folder near holds all of them.
    """
    for candidate in _near(folder):
        found = _inputs(candidate)
        if found is not None and found.tensors.shapes["noise"][2:] == latents[2:]:
            return found
    raise UsageError(
        f"no inputs for latents of shape {list(latents)} in or above {folder}: expected a folder with a JSON of model "
        "and sampler, the generator's weights, and prompt_embeds, noise and step_noise. Fix: keep it beside the cases"
    )


def holds_inputs(folder: Folder) -> bool:
    """Whether a folder holds inputs and no cases of its own."""
    return _inputs(folder) is not None


def _inputs(folder: Folder) -> Inputs | None:
    settings = [record for record in folder.records if record.holds("model", "sampler")]
    weights = generator_files(folder)
    tensors = [file for file in folder.vectors if file.has("prompt_embeds", "noise", "step_noise")]
    if not (settings and weights and tensors):
        return None
    content = settings[0].content
    return Inputs(wan_config(content["model"]), content["sampler"], weights[0].path, tensors[0])


def _near(folder: Path) -> Iterator[Folder]:
    """The folder and those above it, each followed by the folders in it."""
    here = folder.resolve()
    for level in [here, *here.parents][: LEVELS_UP + 1]:
        for place in [level, *sorted(level.iterdir())]:
            if place.is_dir() and os.access(place, os.R_OK | os.X_OK):
                yield Folder(place)


def _check(folder: Folder, golden_record: CaseRecord | None, vectors: Vectors | None, sheet: Sheet) -> None:
    if golden_record is None or vectors is None:
        sheet.add("files", "fail", "a case needs a JSON with settings.method and a safetensors file with latents")
        return
    golden, settings = golden_record.content, golden_record.content["settings"]
    if settings.get("optional"):
        sheet.add("latents", "skip", "optional: true in its settings (prompt switches inside a rollout are left out)")
        return
    inputs = find_inputs(folder.path, vectors.shapes["latents"])
    sampler = _sampler(inputs, settings)
    if "warped_timesteps" in inputs.sampler:
        shared = torch.tensor(_timesteps(sampler)[:-1])
        sheet.close("timesteps of the inputs", shared, torch.tensor(inputs.sampler["warped_timesteps"]), TIMESTEPS)
    if "timesteps" in golden:
        sampler = _own_timesteps(sampler, golden["timesteps"], vectors.shapes.get("x0_pred"))
    own = {SETTING_NAMES.get(name, name): value for name, value in settings.items() if name not in NOT_SETTINGS}
    frames = int(settings.get("frames", golden.get("frames", vectors.shapes["latents"][1])))
    step_noise = inputs.tensors["step_noise"]
    blocks, last = frames // sampler.frames_per_block, len(sampler.denoising_steps)
    recording = record(
        golden_transformer(inputs.weights, inputs.config),
        sampler,
        settings["method"],
        with_local_weights(settings["method"], own, folder),
        inputs.tensors["prompt_embeds"],
        inputs.tensors["noise"][:, :frames],
        # Batch and frames may be stored as one axis or as two; a case may use fewer passes than the inputs provide for.
        (step_noise.flatten(2, 3) if step_noise.dim() == 7 else step_noise)[:, : last - 1],
        wanted=lambda block, step, layer: (block, step) == (blocks - 1, last),
    )
    sheet.close("latents", recording.latents, vectors["latents"], LATENTS)
    if "timesteps" in golden:
        ours = torch.tensor(recording.timesteps[: len(golden["timesteps"])])
        sheet.close("timesteps", ours, torch.tensor(golden["timesteps"]), TIMESTEPS)
    _check_passes(recording, vectors, sheet)
    rows = token_rows(recording)
    check_stored_cache(recording, rows[-1], vectors, settings["method"], golden.get("local_end_index"), sheet)
    _check_selections(recording, vectors, sheet)
    for companion in folder.records:
        if case_stem(companion.path) == case_stem(vectors.path) and isinstance(companion.content, list):
            _check_trace(recording, rows, companion.content, sheet)
    for file in folder.vectors:
        if case_stem(file.path) == case_stem(vectors.path) and file.named("ctx."):
            _check_tokens(rows, file, sheet)


def _sampler(inputs: Inputs, settings: Mapping[str, Any]) -> SamplerConfig:
    golden = inputs.sampler
    return SamplerConfig(
        denoising_steps=tuple(golden["denoising_step_list"]),
        warp=golden.get("warp_denoising_step", True),
        shift=golden["timestep_shift"],
        context_timestep=golden.get("context_noise_timestep", 0.0),
        frames_per_block=settings.get("frames_per_block", golden.get("num_frame_per_block", 3)),
    )


def _timesteps(sampler: SamplerConfig) -> list[float]:
    """Timestep of every pass of a block, the clean-context pass last."""
    steps = sampler.denoising_steps
    warped = FlowMatchSchedule(sampler.shift).warp(steps) if sampler.warp else [float(t) for t in steps]
    return [*warped, sampler.context_timestep]


def _own_timesteps(sampler: SamplerConfig, golden: list[Any], passes: tuple[int, ...] | None) -> SamplerConfig:
    """The sampler with the case's own timesteps, where they are not those of the shared inputs.

    The clean-context pass's comes last; it may be left out, as the number of stored passes [blocks, passes, …] shows.
    """
    shared = _timesteps(sampler)
    whole = golden if passes is None or passes[1] == len(golden) else [*golden, sampler.context_timestep]
    if len(whole) == len(shared) and torch.allclose(torch.tensor(whole), torch.tensor(shared), rtol=1e-6, atol=0):
        return sampler
    return replace(sampler, denoising_steps=tuple(whole[:-1]), warp=False, context_timestep=float(whole[-1]))


def _check_passes(recording: Recording, vectors: Vectors, sheet: Sheet) -> None:
    """Network output and prediction of every pass, [blocks, passes, n, C, H, W] for a batch of one."""
    for name, values in (("x0_pred", recording.x0), ("flow_pred", recording.flow)):
        if name in vectors:
            blocks = range(len(recording.trace))
            ours = torch.stack([torch.stack([values[b, p] for p in range(len(recording.timesteps))]) for b in blocks])
            golden = vectors[name]
            sheet.close(name, ours[:, :, 0] if golden.dim() == 6 else ours, golden, LATENTS)


def _check_selections(recording: Recording, vectors: Vectors, sheet: Sheet) -> None:
    """Rows that Deep Forcing selected in each stored compression."""
    ours, golden = [], []
    for name in sorted(vectors.shapes):
        if match := _SELECTED.fullmatch(name):
            (policy, *_), state = recording.policies, recording.state[int(match[1])][0]
            selected = policy.selected_rows(state, int(match[2])) if isinstance(policy, DeepForcing) else None
            ours.append((name, "no compression" if selected is None else sorted(selected.tolist())))
            golden.append((name, sorted(vectors[name].tolist())))
    if golden:
        sheet.same(f"selected tokens ({len(golden)})", ours, golden)


def _check_trace(recording: Recording, rows: list[list[TokenRows]], golden: list[Any], sheet: Sheet) -> None:
    """Attended frames, temporal indices and rows of layer 0 in every block; ours are the same in all passes."""
    ours = [[entry["block"], rows[entry["block"]][0].groups()] for entry in golden]
    sheet.same("context trace", ours, [[entry["block"], entry["groups"]] for entry in golden])
    indices = [recording.query_indices[entry["block"]][0] for entry in golden]
    sheet.same("query indices", indices, [entry["query_index"] for entry in golden])


def _check_tokens(rows: list[list[TokenRows]], golden: Vectors, sheet: Sheet) -> None:
    """Origin and temporal index of every attended row in the blocks that are stored."""
    origins, indices = {}, {}
    exact = Bound()
    for name in golden.shapes:
        if match := _TOKENS.fullmatch(name):
            ours = rows[int(match[1])][int(match[3])]
            if match[4] == "temporal_index":
                indices[name] = (ours.temporal_index, golden[name], exact)
            else:
                origins[name] = (ours.frame * (int(ours.token.max()) + 1) + ours.token, golden[name], exact)
    sheet.close_all("origin tokens", origins)
    sheet.close_all("temporal indices", indices)

"""Golden rollouts in the format of golden/methods: all context methods on shared inputs stored near the cases.

Compared are latents, predictions, the final cache or the rows that attention received, traces, what Deep Forcing,
MemFlow and Forcing-KV selected, and how Dummy Forcing classified heads. The scores behind Deep Forcing's selections are
not: a different choice shows, an equal one needs no further proof.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrag_ray.conformance import windows
from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors, case_stem, pair
from lrag_ray.conformance.recording import (
    CPU,
    Recording,
    generator_files,
    golden_transformer,
    record,
    wan_config,
    with_local_weights,
)
from lrag_ray.conformance.stored_cache import check_stored_cache
from lrag_ray.conformance.stored_history import check_stored_history, keeps_history
from lrag_ray.conformance.token_rows import TokenRows, token_rows
from lrag_ray.context.deep_forcing import DeepForcing
from lrag_ray.context.dummy_forcing import DummyForcing
from lrag_ray.context.forcing_kv import ForcingKv
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.errors import UsageError
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.rollout.rolling import window_of
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.schedule import FlowMatchSchedule

LATENTS = Bound(absolute=1e-4)
"""Allowed difference, where the case states no smaller one."""
SLOW_DECAY, SLOW_LATENTS = 0.99, Bound(absolute=2e-5)
"""A sink that keeps this share of itself differs from one that keeps all by a few 1e-4, so the bound is tighter."""
TIMESTEPS = Bound(relative=1e-6)
LEVELS_UP = 3
"""How far above a case its inputs are looked for."""

SETTING_NAMES = {
    **{"K": "top_k", "R": "recent_exclude", "history_admission": "admission", "ae_ckpt": "encoder"},
    **{"anchor_frames": "anchor", "attention_frames": "window"},
}
"""Golden settings that we call otherwise."""
NOT_SETTINGS = {"method", "frames_per_block", "frames", "optional"}
"""Entries of the golden settings that are not the policy's."""
IMPLIED: dict[str, dict[str, Any]] = {
    "rolling_sink": {"sink": 0},
    "ema_sink": {"update": "ema"},
    "dummy_forcing": {"sink": 1},
}
"""Golden settings that are none of ours, because the method has them in this one way."""
DERIVED = {
    "dummy_forcing": {"window", "head_groups"},
    "forcing_kv": {"window"},
    "rolling_forcing": {"cache_frames", "joint_blocks"},
}
"""Golden settings that follow from the others, from the sampler and from the sampled rows."""
UNMENTIONED = {"memrope": {"first_overflow": "released"}}
"""Behaviour of the released code that the golden settings do not mention, and that is not our default."""

_SELECTED = re.compile(r"pc\.block(\d+)\.layer(\d+)\.selected_aug_index")
_ATTENDED = re.compile(
    r"attended\.(?:block(\d+)\.pass(\d+)|window(\d+)\.(joint|clean))\.layer(\d+)(?:\.head(\d+))?\.([kv])"
)
_BANK = re.compile(r"memflow\.block(\d+)\.layer(\d+)\.(scores|kept_slots)")
_PATCHES = re.compile(r"fkv\.block(\d+)\.(patch_scores|selected)")
_TOKENS = re.compile(r"ctx\.block(\d+)\.pass(\d+)\.layer(\d+)(?:\.head(\d+))?\.(origin_token|temporal_index)")


def cases(folder: Folder, bank: BankType | None = None, device: torch.device = CPU) -> list[GoldenCase]:
    """A case per JSON with the settings of a method, and its latents, computed on `device`; `bank` judges histories
    stored so instead."""
    records = [r for r in folder.records if r.holds("settings") and "method" in r.content["settings"]]
    vectors = [file for file in folder.vectors if "latents" in file]
    return [
        GoldenCase(case.stem, partial(_check, folder, case.record, case.vectors, bank=bank, device=device))
        for case in pair(records, vectors)
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
        sheet.add("files", "fail", "a case needs a JSON with settings.method and a safetensors file with latents")
        return
    golden, settings = golden_record.content, golden_record.content["settings"]
    if settings.get("optional"):
        sheet.add("latents", "skip", "optional: true in its settings (prompt switches inside a rollout are left out)")
        return
    try:
        method, own = settings["method"], _policy_settings(settings)
    except _RefusedError as refused:
        sheet.add("latents", "skip", str(refused))
        return
    inputs = find_inputs(folder.path, vectors.shapes["latents"])
    sampler = _sampler(inputs.sampler, settings)
    if "warped_timesteps" in inputs.sampler:
        shared = torch.tensor(_timesteps(sampler)[:-1])
        sheet.close("timesteps of the inputs", shared, torch.tensor(inputs.sampler["warped_timesteps"]), TIMESTEPS)
    sampler = _sampler({**inputs.sampler, **golden.get("sampler", {})}, settings)
    if "timesteps" in golden:
        sampler = _own_timesteps(sampler, golden, vectors.shapes.get("x0_pred"))
    frames = int(settings.get("frames", golden.get("frames", vectors.shapes["latents"][1])))
    step_noise = inputs.tensors["step_noise"]
    draws = max(len(sampler.steps_of(0)), len(sampler.denoising_steps)) - 1
    last = frames // sampler.frames_per_block - 1, len(sampler.denoising_steps)
    blocks = frames // sampler.frames_per_block
    attended = {place: name for name in vectors.shapes if (place := _attended(name, blocks, last[1]))}
    wanted = {last} | {(block, step) for block, step, *_ in attended}
    choices: dict[int, tuple[Tensor, Tensor | None]] = {}

    def look(block: int, policies: Sequence[ContextPolicy[Any]]) -> None:
        policy = policies[0]
        if isinstance(policy, DummyForcing) and block == 0 and "dummy.sampled_rows" in vectors:
            policy.sampled_rows = vectors["dummy.sampled_rows"].long().to(device)
        if isinstance(policy, ForcingKv) and policy.chosen is not None:
            scores = policy.chosen.scores
            choices[block - 1] = policy.chosen.patches.read(), None if scores is None else scores.read()

    roll_out = partial(
        record,
        golden_transformer(inputs.weights, inputs.config, device),
        sampler,
        method,
        with_local_weights(method, own, folder),
        inputs.tensors["prompt_embeds"],
        inputs.tensors["noise"][:, :frames],
        # Batch and frames may be stored as one axis or as two; a case may use fewer passes than the inputs provide for.
        (step_noise.flatten(2, 3) if step_noise.dim() == 7 else step_noise)[:, :draws],
    )
    latents = vectors["latents"]
    if bank is not None:
        if keeps_history(method, own, sampler.frames_per_block, sheet):
            check_stored_history(lambda kind: roll_out(bank=kind), latents, bank, sheet)
        return
    recording = roll_out(wanted=lambda block, step, layer: (block, step) in wanted, look=look)
    # Of a rollout whose last blocks depend on its length, fewer frames may be stored than were rolled out.
    sheet.close("latents", recording.latents[:, : latents.shape[1]], latents, _bound(golden))
    for name, block in (("timesteps_first_block", 0), ("timesteps", -1)):
        if name in golden:
            ours = torch.tensor(recording.timesteps[block][: len(golden[name])])
            sheet.close(name, ours, torch.tensor(golden[name]), TIMESTEPS)
    _check_passes(recording, vectors, sheet)
    _check_attended(recording, attended, vectors, sheet)
    traces = [r.content for r in folder.records if _belongs(r.path, vectors) and isinstance(r.content, list)]
    tokens = [file for file in folder.vectors if _belongs(file.path, vectors) and file.named("ctx.")]
    if any(windows.calls(recording)):
        for trace in traces:
            windows.check_trace(recording, trace, sheet)
        for file in tokens:
            windows.check_tokens(recording, file, sheet)
        return
    rows = _Rows(recording)
    check_stored_cache(recording, rows[0][-1], vectors, method, golden.get("local_end_index"), sheet)
    _check_selections(recording, vectors, sheet)
    _check_bank(recording, vectors, sheet)
    _check_heads(recording, vectors, sheet)
    _check_patches(choices, vectors, sheet)
    for trace in traces:
        _check_trace(recording, rows, trace, sheet)
    for file in tokens:
        _check_tokens(rows, file, sheet)


def _belongs(path: Path, vectors: Vectors) -> bool:
    return case_stem(path) == case_stem(vectors.path)


class _RefusedError(Exception):
    """The case asks for something that is refused here."""


def _policy_settings(golden: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of our policy from those of a case."""
    method = golden["method"]
    implied = IMPLIED.get(method, {})
    others = NOT_SETTINGS | DERIVED.get(method, set())
    own = {SETTING_NAMES.get(name, name): value for name, value in golden.items() if name not in others}
    for name in implied.keys() & own.keys():
        if own.pop(name) != implied[name]:
            raise _RefusedError(f"{name} {golden[name]!r} is not done by {method}, which has {implied[name]!r} alone")
    return UNMENTIONED.get(method, {}) | own


def _bound(golden: Mapping[str, Any]) -> Bound:
    """Allowed difference of latents: the case's own, but never more than ours."""
    if golden["settings"].get("alpha", 0) >= SLOW_DECAY:
        return SLOW_LATENTS
    stated = golden.get("tolerance")
    return Bound(min(LATENTS.absolute, stated["latents"])) if stated and "latents" in stated else LATENTS


class _Place(NamedTuple):
    """Where attended rows were stored."""

    block: int
    step: int
    layer: int
    head: int | None
    which: str
    """k or v."""


def _attended(name: str, blocks: int, steps: int) -> _Place | None:
    """Place of a stored tensor of attended rows, in a rollout of `blocks` blocks in `steps` steps.

    A joint call is recorded as pass 0 of its window, and its clean call as the last pass of the block that it stores.
    """
    match = _ATTENDED.fullmatch(name)
    if match is None:
        return None
    if match[3] is None:
        block, step = int(match[1]), int(match[2])
    elif match[4] == "joint":
        block, step = int(match[3]), 0
    else:
        block, step = window_of(int(match[3]), steps, blocks).first, steps
    return _Place(block, step, int(match[5]), int(match[6]) if match[6] else None, match[7])


class _Rows:
    """`token_rows` by head, computed where they are asked for."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._heads: dict[int, list[list[TokenRows]]] = {}

    def __getitem__(self, head: int) -> list[list[TokenRows]]:
        if head not in self._heads:
            self._heads[head] = token_rows(self._recording, head=head)
        return self._heads[head]


def _sampler(golden: Mapping[str, Any], settings: Mapping[str, Any]) -> SamplerConfig:
    first = golden.get("first_block_denoising_step_list")
    return SamplerConfig(
        denoising_steps=tuple(golden["denoising_step_list"]),
        warp=golden.get("warp_denoising_step", True),
        shift=golden["timestep_shift"],
        context_timestep=golden.get("context_noise_timestep", 0.0),
        frames_per_block=settings.get("frames_per_block", golden.get("num_frame_per_block", 3)),
        first_block_denoising_steps=tuple(first) if first else None,
    )


def _timesteps(sampler: SamplerConfig, block: int = 1) -> list[float]:
    """Timestep of every pass of a block, the clean-context pass last."""
    steps = sampler.steps_of(block)
    warped = FlowMatchSchedule(sampler.shift).warp(steps) if sampler.warp else [float(t) for t in steps]
    return [*warped, sampler.context_timestep]


def _own_timesteps(sampler: SamplerConfig, golden: Mapping[str, Any], passes: tuple[int, ...] | None) -> SamplerConfig:
    """The sampler with the case's own timesteps, where they are not those of its step lists.

    The clean-context pass's comes last; it may be left out, as the number of stored passes [blocks, passes, …] shows.
    """
    stated = golden["timesteps"]
    whole = stated if passes is None or passes[1] == len(stated) else [*stated, sampler.context_timestep]
    first = golden.get("timesteps_first_block", _timesteps(sampler, 0) if sampler.first_block_denoising_steps else None)
    if _equal(whole, _timesteps(sampler)) and (first is None or _equal(first, _timesteps(sampler, 0))):
        return sampler
    return replace(
        sampler,
        denoising_steps=tuple(whole[:-1]),
        first_block_denoising_steps=tuple(first[:-1]) if first else None,
        warp=False,
        context_timestep=float(whole[-1]),
    )


def _equal(stated: list[float], ours: list[float]) -> bool:
    return len(stated) == len(ours) and torch.allclose(torch.tensor(stated), torch.tensor(ours), rtol=1e-6, atol=0)


def _check_passes(recording: Recording, vectors: Vectors, sheet: Sheet) -> None:
    """Network output and prediction of every pass, [blocks, passes, n, C, H, W] for a batch of one.

    Where the first block has more passes than the others, it is stored by itself: [passes, n, C, H, W], or with a
    block axis of 1.
    """
    count = len(recording.trace)
    for name, values in (("x0_pred", recording.x0), ("flow_pred", recording.flow)):
        for suffix, blocks in (("", range(count)), ("_first_block", range(1)), ("_other_blocks", range(1, count))):
            if name + suffix not in vectors:
                continue
            golden = vectors[name + suffix]
            ours = torch.stack(
                [torch.stack([values[b, p] for p in range(len(recording.timesteps[b]))]) for b in blocks]
            )
            ours = ours if golden.dim() == 7 else ours[:, :, 0]
            sheet.close(name + suffix, ours[0] if golden.dim() == 5 else ours, golden, LATENTS)


def _check_attended(recording: Recording, places: Mapping[_Place, str], vectors: Vectors, sheet: Sheet) -> None:
    """Rotated keys and values that attention received, [rows, H or 1, head_dim] or with a batch axis."""
    for which in ("k", "v"):
        pairs = {}
        for place, name in places.items():
            if place.which == which:
                at = (place.block, place.step, place.layer)
                rows = recording.attended[at] if place.head is None else recording.of_head(*at, place.head)
                golden, ours = vectors[name], getattr(rows, which)
                pairs[name] = (ours[0] if golden.dim() == 3 else ours, golden, LATENTS)
        sheet.close_all(f"attended {which}", pairs)


def _check_bank(recording: Recording, vectors: Vectors, sheet: Sheet) -> None:
    """What MemFlow's bank was scored with and which of its slots were kept, best first, in each stored selection."""
    scores, ours, golden = {}, [], []
    for name in sorted(vectors.shapes):
        if match := _BANK.fullmatch(name):
            block, layer = int(match[1]), int(match[2])
            before, after = (
                [row for row in recording.rows(b, 0, layer) if row.kind == "memory"] for b in (block - 1, block)
            )
            if match[3] == "scores":
                scores[name] = (torch.tensor([row.similarity for row in before]), vectors[name], LATENTS)
            else:
                slots = [row.frame for row in before]
                ours.append((name, [slots.index(row.frame) if row.frame in slots else None for row in after[:-1]]))
                golden.append((name, vectors[name].tolist()))
    sheet.close_all("bank scores", scores)
    if golden:
        sheet.same(f"kept bank frames ({len(golden)})", ours, golden)


def _check_heads(recording: Recording, vectors: Vectors, sheet: Sheet) -> None:
    """Attention shares [layers, H, 3] that Dummy Forcing classified heads by, and the classes."""
    policy = recording.policies[0]
    if not isinstance(policy, DummyForcing) or "dummy.assignment" not in vectors:
        return
    shares = policy.shares()
    if "dummy.scores" in vectors:
        sheet.close("head scores", torch.empty(0) if shares is None else shares, vectors["dummy.scores"], LATENTS)
    sheet.same("classes of heads", policy.classes, vectors["dummy.assignment"].tolist())


def _check_patches(choices: Mapping[int, tuple[Tensor, Tensor | None]], vectors: Vectors, sheet: Sheet) -> None:
    """Patches that Forcing-KV chose in each stored block, and what they were chosen by."""
    scores, ours, golden = {}, [], []
    for name in sorted(vectors.shapes):
        if match := _PATCHES.fullmatch(name):
            patches, similarity = choices.get(int(match[1]), (torch.empty(0), None))
            if match[2] == "selected":
                ours.append((name, patches.tolist()))
                golden.append((name, vectors[name].tolist()))
            else:
                scores[name] = (torch.empty(0) if similarity is None else similarity, vectors[name], LATENTS)
    sheet.close_all("patch scores", scores)
    if golden:
        sheet.same(f"kept patches ({len(golden)})", ours, golden)


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


def _check_trace(recording: Recording, rows: _Rows, golden: list[Any], sheet: Sheet) -> None:
    """Attended frames, temporal indices and rows in every block; ours are the same in all passes.

    Entries are of layer 0, or of a layer and the heads that share the rows.
    """
    ours, theirs = [], []
    for entry in golden:
        block, layer = entry["block"], entry.get("layer", 0)
        for head in entry.get("heads", [0]):
            ours.append([block, layer, head, rows[head][block][layer].groups()])
            theirs.append([block, layer, head, entry["groups"]])
    sheet.same("context trace", ours, theirs)
    if named := [entry for entry in golden if "heads" in entry]:
        groups: dict[tuple[int, int], list[int]] = {}
        for entry in named:
            groups.setdefault((entry["block"], entry["layer"]), []).extend(entry["heads"])
        every = list(range(recording.policies[0].layout.num_heads))
        sheet.same("context trace heads", [every] * len(groups), [sorted(heads) for heads in groups.values()])
    indices = [recording.query_indices[entry["block"]][0] for entry in golden]
    sheet.same("query indices", indices, [entry["query_index"] for entry in golden])


def _check_tokens(rows: _Rows, golden: Vectors, sheet: Sheet) -> None:
    """Origin and temporal index of every attended row in the blocks that are stored."""
    origins, indices = {}, {}
    exact = Bound()
    for name in golden.shapes:
        if match := _TOKENS.fullmatch(name):
            ours = rows[int(match[4] or 0)][int(match[1])][int(match[3])]
            if match[5] == "temporal_index":
                indices[name] = (ours.temporal_index, golden[name], exact)
            else:
                origins[name] = (ours.frame * (int(ours.token.max()) + 1) + ours.token, golden[name], exact)
    sheet.close_all("origin tokens", origins)
    sheet.close_all("temporal indices", indices)

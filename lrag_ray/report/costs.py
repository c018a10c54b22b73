"""What methods cost: seconds of the worker per second of video, from the commits, and the memory of their context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lrag_ray.config.methods import registered_method
from lrag_ray.report.collect import ReportData
from lrag_ray.retrieval.bank_types import BANK_TYPES
from lrag_ray.retrieval.payload import FrameShape, make_payload
from lrag_ray.store.identity import BackboneIdentity, MethodIdentity
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.devices import shown_kind, without_row

KINDS = {
    "denoise": "Denoise",
    "context": "Clean pass",
    "retrieval": "Of both: retrieval",
    "decode": "Decode",
    "store": "Store",
    "replay": "Replay",
}
"""Titles of what commits time, in the order of the columns."""
_PER_ROLLOUT = ("replay",)
REFERENCE = "infinity_rope"
"""The same window without a memory: what generation costs above it is the price of a method's memory."""
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Cost:
    """One method on one backbone and kind of device, means over its rollouts."""

    method: str
    rollouts: int
    seconds: Mapping[str, float]
    """By kind of work: per second of video, and per rollout for replay."""
    relative: float | None
    """Denoising and clean passes over those of `REFERENCE`, minus 1; None where the run has no such method."""
    history_bytes: int | None
    """Host memory of a rollout's history at its longest duration, counted; None for a method that is not registered."""
    context_frames: int | None
    """Latent frames that the last block attends to, its own included; as above."""
    context_bytes: int | None
    """Device memory of these frames; as above."""
    beside_bytes: int | None
    """Device memory of what the method holds beside them; as above."""


@dataclass(frozen=True)
class CostTable:
    """Costs that compare: one backbone on one kind of device."""

    backbone: str
    device: str
    duration_s: float
    """The longest, which is what the rows are of."""
    load_s: float
    """Loading in all rollouts together: a worker loads a backbone with the first one that it makes, of any method."""
    rows: Sequence[Cost]

    @property
    def kinds(self) -> list[str]:
        """Kinds of work that any row has, in the order of `KINDS`."""
        return [kind for kind in KINDS if any(kind in row.seconds for row in self.rows)]


def cost_tables(data: ReportData) -> list[CostTable]:
    """Tables of every backbone and kind of device; rollouts of the longest duration alone, since costs grow with it."""
    longest: dict[str, int] = {}
    for rollout, shown in data.rollouts.items():
        longest[rollout.backbone] = max(longest.get(rollout.backbone, 0), shown.videos[-1].latent_frames)
    found: dict[tuple[str, str], dict[str, list[Mapping[str, float]]]] = {}
    load_s: dict[tuple[str, str], float] = {}
    for rollout, shown in data.rollouts.items():
        commit, video = shown.videos[-1].commit, shown.videos[-1]
        if commit.latent_frames != longest[rollout.backbone] or not commit.timings_s:
            continue
        timings = {
            kind: seconds / (1 if kind in _PER_ROLLOUT else video.duration_s)
            for kind, seconds in commit.timings_s.items()
            if kind in KINDS and math.isfinite(seconds) and seconds >= 0
        }
        where = rollout.backbone, without_row(commit.device_kind)
        found.setdefault(where, {}).setdefault(rollout.method, []).append(timings)
        load = commit.timings_s.get("load", 0.0)
        load_s[where] = load_s.get(where, 0.0) + (load if math.isfinite(load) and load > 0 else 0.0)
    return [
        CostTable(
            backbone,
            shown_kind(device),
            data.duration_s(backbone, longest[backbone]),
            load_s[backbone, device],
            _rows(data, backbone, longest, by_method),
        )
        for (backbone, device), by_method in found.items()
    ]


def _rows(
    data: ReportData,
    backbone: str,
    longest: Mapping[str, int],
    by_method: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[Cost]:
    means = {
        method: {
            kind: math.fsum(values) / len(values)
            for kind in KINDS
            if (values := [timings[kind] for timings in rollouts if kind in timings])
        }
        for method, rollouts in by_method.items()
    }
    names = [name for name, method in data.identity.methods.items() if method.method == REFERENCE and name in means]
    reference = _generation(means[names[0]]) if names else None
    rows = []
    for method in (name for name in data.methods[backbone] if name in means):
        own = _generation(means[method])
        identity = data.identity.methods[method]
        memory = _memory(data.identity.backbones[backbone], identity, longest[backbone])
        rows.append(
            Cost(
                method=method,
                rollouts=len(by_method[method]),
                seconds=means[method],
                relative=own / reference - 1 if reference else None,
                history_bytes=memory and memory.history_bytes,
                context_frames=memory and memory.context_frames,
                context_bytes=memory and memory.context_bytes,
                beside_bytes=memory and memory.beside_bytes,
            )
        )
    return rows


def _generation(seconds: Mapping[str, float]) -> float:
    return seconds.get("denoise", 0.0) + seconds.get("context", 0.0)


class _Memory(NamedTuple):
    """Counted at the end of a rollout, see `Cost`."""

    history_bytes: int
    context_frames: int
    context_bytes: int
    beside_bytes: int


def _memory(backbone: BackboneIdentity, method: MethodIdentity, latent_frames: int) -> _Memory | None:
    """None where the run does not say what it takes to count it.

    A stranger's run may hold anything.
    """
    found = registered_method(method.method, method.settings)
    if found is None:
        return None
    policy, settings = found.policy, found.settings
    try:
        frame, stored_frame = _kv_bytes_per_frame(backbone), _stored_frame_bytes(backbone, method.history)
        per_block = backbone.frames_per_block
        history = policy.history_frames(settings, per_block, latent_frames) * stored_frame
        attended = policy.attended_frames(settings, per_block, latent_frames - per_block)
        beside = policy.device_bytes(settings, per_block, latent_frames, stored_frame)
        return _Memory(history, attended, attended * frame, beside)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None


def _kv_bytes_per_frame(backbone: BackboneIdentity) -> int:
    """K and V of one latent frame over all layers."""
    latent = backbone.latents["latent"]
    value_bytes = _DTYPES[backbone.latents["dtype"]].itemsize
    return _sizes(backbone).kv_bytes_per_frame(latent["height"], latent["width"], value_bytes)


def _stored_frame_bytes(backbone: BackboneIdentity, kind: str) -> int:
    """The same as the history stores it."""
    if kind not in BANK_TYPES:
        raise ValueError(f"no storage type of histories is called {kind}")
    sizes, latent = _sizes(backbone), backbone.latents["latent"]
    tokens = sizes.tokens_per_frame(latent["height"], latent["width"])
    shape = FrameShape(sizes.num_layers, tokens, sizes.num_heads, sizes.head_dim)
    return make_payload(kind, shape, _DTYPES[backbone.latents["dtype"]]).frame_bytes


def _sizes(backbone: BackboneIdentity) -> WanConfig:
    sizes = backbone.latents["transformer"]
    return WanConfig(**{**sizes, "patch_size": tuple(sizes["patch_size"])})

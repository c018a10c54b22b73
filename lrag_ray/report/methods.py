"""What the methods of a report keep in their contexts: in a sentence each, and in pictures of one block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lrag_ray.config.methods import registered_method
from lrag_ray.context.policy import Family, summary_of
from lrag_ray.context.trace import RowKind, TraceRow
from lrag_ray.report.collect import ReportData
from lrag_ray.report.players import rollout_trace
from lrag_ray.report.strips import FOLDER, chosen_videos, make_strip
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.parts import BrokenPartError
from lrag_ray.video.mp4 import VideoError

_SHOWN_AT = 0.75
"""Share of the video at which the example is taken, by which a window has long left its beginning."""
_MOST = 12
"""Frames shown of a context; a block attends to this many by default."""
_KINDS = ("sink", "memory", "retrieved", "compressed", "local", "current")
"""Parts of a context in the order in which they are shown."""
_NEEDED = ("current", "sink", "memory", "retrieved", "local", "compressed")
"""The same, those that are shown in any case first."""


class MethodNote(NamedTuple):
    """One method for readers who do not know it."""

    name: str
    summary: str
    """What it keeps; '' where its author does not say."""
    settings: Mapping[str, str]
    """Those that differ from the defaults or within a policy; of a plug-in, which is not imported, all."""


class ContextFrame(NamedTuple):
    """A frame of a context."""

    kind: RowKind
    second: float
    """Of the video, when it is shown."""


class ContextRow(NamedTuple):
    """What one method's block attends to, in one picture."""

    method: str
    path: str
    """Of the picture, relative to the report's folder."""
    frames: Sequence[ContextFrame]
    left_out: int
    """Frames that it attends to as well: beyond the most that are shown, or averages of many."""


class ContextSheet(NamedTuple):
    """The contexts of one block of a prompt, by method."""

    backbone: str
    number: int
    """Of the prompt, from 1."""
    second: float
    """When the block begins."""
    rows: Sequence[ContextRow]

    @property
    def kinds(self) -> set[RowKind]:
        """Parts of a context that are shown."""
        return {frame.kind for row in self.rows for frame in row.frames}

    @property
    def columns(self) -> int:
        """Frames of the longest row."""
        return max(len(row.frames) for row in self.rows)


def method_notes(data: ReportData) -> list[tuple[Family, list[MethodNote]]]:
    """Notes by family, in the order of the tables."""
    return [
        (family, [_note(name, data.identity.methods) for name in names])
        for family, names in data.families(data.identity.methods)
    ]


def _note(name: str, methods: Mapping[str, MethodIdentity]) -> MethodNote:
    method = methods[name]
    alike = [other.settings for other in methods.values() if other.method == method.method]
    found = registered_method(method.method, method.settings)
    summary = method.summary if found is None else summary_of(found.policy)
    defaults = {} if found is None else {each.name: each.default for each in dataclasses.fields(found.policy.Settings)}
    settings = {
        key: str(value)
        for key, value in method.settings.items()
        if isinstance(value, str | int | float)
        and (key not in defaults or value != defaults[key] or any(other.get(key) != value for other in alike))
    }
    return MethodNote(name, summary, settings)


def make_contexts(data: ReportData, folder: Storage) -> list[ContextSheet]:
    """One sheet per backbone that has a trace, of the first prompt of its strips.

    Pictures are strips: made once, in the same folder. A method whose trace or video is damaged is left out; its player
    and its strip give the reason.
    """
    present = folder.list_files(FOLDER)
    sheets = []
    for backbone, identity in data.identity.backbones.items():
        chosen = next(iter(chosen_videos(data, backbone)), {})
        rows, per_block = [], identity.frames_per_block
        for method in (name for name in data.methods[backbone] if name in chosen):
            shown, video = chosen[method]
            block = int(_SHOWN_AT * (video.latent_frames // per_block))
            try:
                trace = [row for row in rollout_trace(shown) if row.block == block]
                # A stranger's trace may name any kind and frame.
                known = [row for row in trace if row.kind in _KINDS and 0 <= row.frame < video.latent_frames]
                kept = _most_telling(known)
                if not kept:
                    continue
                # The last video frame of each latent frame.
                indices = [round(row.frame * (video.frames - 1) / max(1, video.latent_frames - 1)) for row in kept]
                path = make_strip(folder, present, shown.run_dir.storage, video, indices)
            except (BrokenPartError, VideoError):
                continue
            frame_s = video.duration_s / video.latent_frames
            frames = [ContextFrame(row.kind, row.frame * frame_s) for row in kept]
            rows.append(ContextRow(method, path, frames, len(trace) - len(kept)))
            number, second = data.identity.prompts[video.rollout.prompt_id].index + 1, block * per_block * frame_s
        if rows:
            sheets.append(ContextSheet(backbone, number, second, rows))
    return sheets


def _most_telling(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """At most `_MOST` of a context's rows, in the order in which they are shown."""

    def worth(row: TraceRow) -> tuple[int, float]:
        by_kind = {"retrieved": -(row.similarity or 0.0), "compressed": -row.tokens, "local": -row.frame}
        return _NEEDED.index(row.kind), by_kind.get(row.kind, row.frame)

    def place(row: TraceRow) -> tuple[int, float]:
        return _KINDS.index(row.kind), worth(row)[1] if row.kind == "retrieved" else row.frame

    return sorted(sorted(rows, key=worth)[:_MOST], key=place)

"""What the methods of a report keep in their contexts, and an example of what those with retrieval looked up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lrag_ray.config.methods import registered_method
from lrag_ray.context.policy import Family, summary_of
from lrag_ray.context.trace import TraceRow
from lrag_ray.report.collect import ReportData, ShownRollout
from lrag_ray.report.players import read_trace
from lrag_ray.report.strips import COLUMNS, FOLDER, make_strip
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.parts import BrokenPartError
from lrag_ray.video.mp4 import VideoError

_SHOWN_AT = 0.75
"""Share of the video at which the example is taken: what is retrieved there has been out of the window for long."""


class MethodNote(NamedTuple):
    """One method for readers who do not know it."""

    name: str
    summary: str
    """What it keeps; '' where its author does not say."""
    settings: Mapping[str, str]
    """Those that differ from the defaults; of a plug-in, which is not imported, all."""


class Retrieved(NamedTuple):
    """Frames that a block retrieved, in one picture."""

    backbone: str
    method: str
    number: int
    """Of the prompt, from 1."""
    path: str
    """Of the picture, relative to the report's folder: the block's own frame, then the retrieved ones."""
    seconds: Sequence[float]
    """When each of its frames is shown."""


def method_notes(data: ReportData) -> list[tuple[Family, list[MethodNote]]]:
    """Notes by family, in the order of the tables."""
    return [
        (family, [_note(name, data.identity.methods[name]) for name in names])
        for family, names in data.families(data.identity.methods)
    ]


def _note(name: str, method: MethodIdentity) -> MethodNote:
    found = registered_method(method.method, method.settings)
    summary = method.summary if found is None else summary_of(found.policy)
    defaults = {} if found is None else {each.name: each.default for each in dataclasses.fields(found.policy.Settings)}
    settings = {
        key: str(value)
        for key, value in method.settings.items()
        if isinstance(value, str | int | float) and (key not in defaults or value != defaults[key])
    }
    return MethodNote(name, summary, settings)


def make_examples(data: ReportData, folder: Storage) -> list[Retrieved]:
    """One per backbone and method that retrieves frames, of its first prompt, at its longest duration.

    Pictures are strips: made once, in the same folder. Where a trace or a video is damaged there is no example; the
    players and the strips give the reason.
    """
    present = folder.list_files(FOLDER)
    first: dict[tuple[str, str], tuple[int, ShownRollout]] = {}
    for rollout, shown in data.rollouts.items():
        number = data.identity.prompts[rollout.prompt_id].index + 1
        first.setdefault((rollout.backbone, rollout.method), (number, shown))
    found = []
    for (backbone, method), (number, shown) in first.items():
        per_block = data.identity.backbones[backbone].frames_per_block
        try:
            frames = _frames(read_trace(shown), per_block)
            if not frames:
                continue
            video = shown.videos[-1]
            # The last video frame of each latent frame; a stranger's trace may name any.
            per_frame = (video.frames - 1) / max(1, video.latent_frames - 1)
            indices = [min(max(0, round(frame * per_frame)), video.frames - 1) for frame in frames]
            path = make_strip(folder, present, shown.run_dir.storage, video, indices)
        except (BrokenPartError, VideoError):
            continue
        frame_s = video.duration_s / video.latent_frames
        found.append(Retrieved(backbone, method, number, path, [frame * frame_s for frame in frames]))
    return found


def _frames(trace: Sequence[TraceRow], per_block: int) -> list[int]:
    """First latent frame of the block nearest `_SHOWN_AT` that retrieved any, and what it retrieved, best first."""
    retrieved = [row for row in trace if row.kind == "retrieved"]
    if not retrieved:
        return []
    wanted = _SHOWN_AT * max(row.block for row in trace)
    block = min((row.block for row in retrieved), key=lambda block: abs(block - wanted))
    of_block = [row for row in retrieved if row.block == block]
    of_block.sort(key=lambda row: (-(row.similarity if row.similarity is not None else 0.0), row.frame))
    return [block * per_block, *(row.frame for row in of_block[: COLUMNS - 1])]

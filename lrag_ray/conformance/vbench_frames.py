"""Frames of VBench-Long vectors: the official clips of a record, or clips cut from its videos in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from lrag_ray.conformance.files import CaseRecord
from lrag_ray.scoring.vbench_long.clips import ClipSpan, Frame, clip_length, cut
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NetworkName
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.scoring.vbench_long.weights import Weights


class GoldenClip(NamedTuple):
    """A clip of a record."""

    name: str
    span: ClipSpan
    fps: int
    frames: list[Frame]


def recognises(record: CaseRecord) -> bool:
    """Whether a JSON file holds scores of clips in our dimensions."""
    return (
        record.holds("clips", "dimensions")
        and isinstance(record.content["dimensions"], dict)
        and any("per_clip" in record.content["dimensions"].get(name, {}) for name in DIMENSION_NAMES)
    )


def is_in_memory(record: CaseRecord) -> bool:
    """Whether the clips of a record were cut in memory, never re-encoded."""
    return "inmemory" in record.path.stem.replace("_", "") or "in memory" in record.content.get("note", "")


def videos_of(record: CaseRecord) -> list[str]:
    """Names of the videos of a record."""
    return sorted({str(clip["video"]) for clip in record.content["clips"].values()})


def clips_of(record: CaseRecord, video: str) -> list[str]:
    """Names of a video's clips in their order."""
    return sorted(clip for clip, about in record.content["clips"].items() if about["video"] == video)


def missing_files(record: CaseRecord) -> str:
    """What is not there of the frames of a record; empty where all is."""
    root = record.path.parent
    if is_in_memory(record):
        absent = [video for video in videos_of(record) if not source_of(record, video).is_file()]
        return f"{', '.join(absent)}: not among the videos" if absent else ""
    return "" if _clips_folder(root, record.content["clips"]) else "no folder holds the clips of this record"


def source_of(record: CaseRecord, video: str) -> Path:
    """The file of a whole video; a scene of a semantic split is beside its clips."""
    root = record.path.parent
    folder = None if is_in_memory(record) else _clips_folder(root, record.content["clips"])
    places = [place / f"{video}.mp4" for place in (root / "videos", folder) if place is not None]
    return next((place for place in places if place.is_file()), places[0])


def golden_clips(record: CaseRecord, video: str) -> Iterator[GoldenClip]:
    """Clips of a video with their frames; official ones count as laid end to end."""
    names = clips_of(record, video)
    if is_in_memory(record):
        path = source_of(record, video)
        fps = probe(path).fps
        for name, clip in zip(names, cut(decode(path), clip_length(fps)), strict=False):
            yield GoldenClip(name, clip.span, int(fps), clip.frames)
        return
    folder = _clips_folder(record.path.parent, record.content["clips"])
    assert folder is not None, "asked for before"
    start = 0
    for name in names:
        frames = list(decode(folder / f"{name}.mp4"))
        yield GoldenClip(name, ClipSpan(start, len(frames)), int(record.content["clips"][name]["fps"]), frames)
        start += len(frames)


def first_frames(record: CaseRecord, video: str, kind: str) -> list[Frame] | None:
    """The first frames of a video's clips as a consistency dimension saw them; None where their file is not there."""
    if is_in_memory(record):
        return [clip.frames[0] for clip in golden_clips(record, video)]
    path = record.path.parent / f"firstframes_{kind}" / f"{video}.mp4"
    return list(decode(path)) if path.is_file() else None


def _clips_folder(root: Path, clips: Mapping[str, Any]) -> Path | None:
    """The folder under `root` that holds all of the named clips."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
    return next((folder for folder in folders if all((folder / f"{clip}.mp4").is_file() for clip in clips)), None)


class _Noted(RandomWeights):
    """The recipe, and the checksum of every tensor that was drawn."""

    def __init__(self) -> None:
        self.checksums: dict[NetworkName, dict[str, str]] = {}

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        weights = super().read(name, expected)
        self.checksums[name] = {
            key: f"{crc32(tensor.numpy().tobytes()):08x}"
            for key, tensor in weights.tensors.items()
            if tensor.is_floating_point()
        }
        return weights


@cache
def recipe() -> _Noted:
    """The weights of `networks`."""
    return _Noted()


@cache
def networks() -> Networks:
    """All networks with the recipe's weights, in float32, on a GPU where there is one."""
    return Networks(recipe(), "cuda" if torch.cuda.is_available() else "cpu", precision="float32")

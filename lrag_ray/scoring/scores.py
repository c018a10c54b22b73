"""The scores behind a report, in one form for all suites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lrag_ray.scoring.drift import VideoClips
from lrag_ray.scoring.ranks import Unit, VideoScore
from lrag_ray.scoring.video_rows import VideoRow


@dataclass
class Scores:
    """Values of one suite (and mode), of one run or several."""

    videos: list[VideoScore] = field(default_factory=list)
    """Videos at durations with the values that they have, in prompt-major order."""
    clips: list[VideoClips] = field(default_factory=list)
    """The clips behind them, where the suite has clips."""
    rows: list[VideoRow] = field(default_factory=list)
    """The stored rows behind them, where the suite stores one per video."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a video has no score, or misses measures, by its path."""
    damaged: list[str] = field(default_factory=list)
    """Score files, relative to their run, that cannot be read; what they held counts as pending."""
    pending: int = 0
    """Videos at durations that are not scored, or not in full, and may still be."""
    frozen: dict[str, dict[Unit, Mapping[str, float]]] = field(default_factory=dict)
    """Control: the first frame held. Values by measure, by backbone and unit."""
    untrained: bool = False
    """Networks had random weights: the numbers mean nothing."""
    computed: Counter[str] = field(default_factory=Counter)
    """How rows were computed (device, precision, versions), and how many."""
    networks: set[str] = field(default_factory=set)
    """``name:digest`` of all networks behind the values."""
    records: list[Any] = field(default_factory=list)
    """Stored records of suites that store something else than a row per video."""
    remarks: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    """What stands under a video, by the rollout's path and latent frames; written by a model, so text alone."""
    remarks_on_all: list[str] = field(default_factory=list)
    """What is known of all values together, such as how far raters agree."""

    def add(self, other: Scores, methods: Mapping[str, str], backbones: Mapping[str, str]) -> None:
        """Take in the scores of another run, whose methods and backbones get new names where the mappings have one.

        Of a control that both have, the one that is there already counts.
        """

        def named(video: VideoScore) -> VideoScore:
            method, backbone = methods.get(video.method, video.method), backbones.get(video.backbone, video.backbone)
            return video._replace(method=method, backbone=backbone)

        renamed = replace(
            other,
            videos=[named(video) for video in other.videos],
            clips=[replace(clips, video=named(clips.video)) for clips in other.clips],
            rows=[_renamed_row(row, methods, backbones) for row in other.rows],
            frozen={backbones.get(name, name): units for name, units in other.frozen.items()},
            remarks={
                (_renamed_path(path, methods, backbones), frames): texts
                for (path, frames), texts in other.remarks.items()
            },
        )
        for name, units in self.frozen.items():
            renamed.frozen[name] = {**renamed.frozen.get(name, {}), **units}
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(renamed, each.name)
            match mine:
                case list():
                    mine.extend(theirs)
                case set() | dict():  # A Counter adds up.
                    mine.update(theirs)
                case bool():
                    setattr(self, each.name, mine or theirs)
                case int():
                    setattr(self, each.name, mine + theirs)

    @property
    def dimensions(self) -> set[str]:
        """Measures that any video has."""
        return {name for video in self.videos for name in video.values}


def _renamed_path(path: str, methods: Mapping[str, str], backbones: Mapping[str, str]) -> str:
    folder, backbone, method, rest = path.split("/", 3)
    return "/".join((folder, backbones.get(backbone, backbone), methods.get(method, method), rest))


def _renamed_row(row: VideoRow, methods: Mapping[str, str], backbones: Mapping[str, str]) -> VideoRow:
    target = row.target
    method, backbone = methods.get(target.method, target.method), backbones.get(target.backbone, target.backbone)
    return replace(row, target=replace(target, method=method, backbone=backbone))

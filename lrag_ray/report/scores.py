"""The scores behind a report, in one form for all suites, and the choice between suites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pyarrow import ArrowException

from lrag_ray.errors import UsageError
from lrag_ray.scoring.drift import VideoClips
from lrag_ray.scoring.preview.measures import PREVIEW
from lrag_ray.scoring.ranks import Unit, VideoScore
from lrag_ray.scoring.table import ScoreRow, Suite, from_parquet
from lrag_ray.scoring.vbench_long.measures import MEASURES, vbench_long
from lrag_ray.scoring.vbench_long.measures import NAME as VBENCH_LONG
from lrag_ray.scoring.vbench_long.parquet import folder
from lrag_ray.scoring.vbench_long.names import Mode
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo

MODES: tuple[Mode, ...] = ("compat", "direct")
"""The one that compares with published numbers first."""


@dataclass
class Scores:
    """Values of one suite (and mode), of one run or several."""

    videos: list[VideoScore] = field(default_factory=list)
    """Videos at durations that have all their values, in prompt-major order."""
    clips: list[VideoClips] = field(default_factory=list)
    """The clips behind them, where the suite has clips."""
    preview_rows: list[ScoreRow] = field(default_factory=list)
    """The rows behind them, in the preview suite."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a video has no score, by its path."""
    damaged: list[str] = field(default_factory=list)
    """Score files, below their run, that cannot be read; what they held counts as pending."""
    pending: int = 0
    """Videos at durations that are not scored, or not in full, and may still be."""
    frozen: dict[str, dict[Unit, Mapping[str, float]]] = field(default_factory=dict)
    """Control: the first frame held. Values by measure, by backbone and unit."""
    untrained: bool = False
    """Networks had random weights: the numbers mean nothing."""
    computed: Counter[str] = field(default_factory=Counter)
    """How rows came about (device, precision, versions), and how many."""
    networks: set[str] = field(default_factory=set)
    """``name:digest`` of all networks behind the values."""

    @property
    def dimensions(self) -> set[str]:
        """Measures that any video has."""
        return {name for video in self.videos for name in video.values}


class SuiteChoice(NamedTuple):
    """Which scores a report shows."""

    name: str
    mode: Mode | None
    """Of VBench-Long, else None."""

    def suite(self, scores: Scores) -> Suite:
        """The suite, with the dimensions that were scored."""
        return PREVIEW if self.mode is None else vbench_long(self.mode, scores.dimensions or MEASURES)

    def __str__(self) -> str:
        return self.name if self.mode is None else f"{self.name}, {self.mode} mode"


def choose_suite(
    run_dirs: Sequence[RolloutRun], name: str | None, mode: Mode | None, *, must_have: bool = False
) -> tuple[SuiteChoice, list[str]]:
    """What to show, and what else there is to show.

    What is not asked for is chosen: what all runs have goes before what only some have, then VBench-Long before the
    preview suite and ``compat`` before ``direct``.

    Raises:
        UsageError: a mode of the preview suite, which has none; with `must_have`, scores that no run has while there
            are others.
    """
    if name == PREVIEW.name and mode is not None:
        raise UsageError(f"--mode {mode} is a way to compute {VBENCH_LONG}; the {PREVIEW.name} suite has no modes")
    folders = {SuiteChoice(VBENCH_LONG, each): folder(each) for each in MODES}
    folders[SuiteChoice(PREVIEW.name, None)] = PREVIEW.folder
    listings = [run_dir.storage.list_files("scores") for run_dir in run_dirs]
    present = {
        choice: sum(any(path.startswith(f"{place}/") for path in listing) for listing in listings)
        for choice, place in folders.items()
    }
    asked_for = VBENCH_LONG if mode is not None else name
    open_to = [c for c in folders if asked_for in (None, c.name) and mode in (None, c.mode)]
    best = max(open_to, key=lambda choice: present[choice])
    if asked_for is None and not present[best]:
        best = SuiteChoice(PREVIEW.name, None)
    others = [str(choice) for choice in folders if present[choice] and choice != best]
    if must_have and others and not present[best]:
        where = ", ".join(run_dir.uri for run_dir in run_dirs)
        modes = f" --mode {best.mode}" if best.mode else ""
        raise UsageError(
            f"there are no scores of {best} in {where}, but of {'; '.join(others)}: name those with --suite and "
            f"--mode, or make the missing ones with `lrag-ray score RUN --suite {best.name}{modes}`"
        )
    return best, others


def add_preview_scores(
    scores: Scores, run_dir: RolloutRun, videos: Mapping[RolloutId, Sequence[CommittedVideo]]
) -> None:
    """Add a run's preview scores, in the order of `videos`; rows of videos that were since replaced are left out."""
    order = {
        (video.rollout.path, video.latent_frames, video.video.sha256): i
        for i, video in enumerate(video for group in videos.values() for video in group)
    }
    found = {}
    paths = [path for path in run_dir.storage.list_files(PREVIEW.folder) if path.endswith(".parquet")]
    for path, data in run_dir.storage.read_many(paths).items():
        try:
            rows = from_parquet(data, PREVIEW)
        except ArrowException:
            scores.damaged.append(path)
            continue
        for row in rows:
            position = order.get((row.target.rollout_path, row.target.latent_frames, row.target.video_sha256))
            if position is not None:
                found[position] = row
    scores.pending += len(order) - len(found)
    for _, row in sorted(found.items()):
        target = row.target
        scores.preview_rows.append(row)
        scores.computed[row.versions] += 1
        if row.reason is not None:
            scores.failures[target.video_path] = row.reason
            continue
        scores.videos.append(
            VideoScore(
                target.backbone, target.method, target.latent_frames, target.prompt_id, target.sample, row.values
            )
        )

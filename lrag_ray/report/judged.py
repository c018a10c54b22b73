"""Tables of suites that stand beside another suite's on a page: means with intervals, never ranked with the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lrag_ray.report.csv_text import csv_text
from lrag_ray.report.merge import Names
from lrag_ray.scoring.bootstrap import Interval, intervals, prompt_means
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import RankBlock, Unit, VideoScore, average_ranks
from lrag_ray.scoring.registry import registered, suite_class
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import Suite
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo


class Counted(NamedTuple):
    """What of a run counts on a page."""

    run: RolloutRun
    names: Names
    videos: Mapping[RolloutId, Sequence[CommittedVideo]]

    def read(self, suite: Suite[Any], scores: Scores) -> None:
        """Add its scores of a suite under the names of the page."""
        own = Scores()
        suite.read(own, self.run, self.videos)
        scores.add(own, self.names.methods, self.names.backbones)


class Mean(NamedTuple):
    """A mean of one method in one cell."""

    interval: Interval
    videos: int


@dataclass(frozen=True)
class Judged:
    """A suite's answers about the runs of a report."""

    suite: Suite[Any]
    scores: Scores
    blocks: Sequence[RankBlock]

    def means(self, measure: Measure) -> dict[str, dict[tuple[str, int], Mean]]:
        """By method, then backbone and latent frames: the paper's Table 3b.

        Over the prompts that all methods of the cell have, where there are such; otherwise over the method's own.
        """
        found: dict[str, dict[tuple[str, int], Mean]] = {}
        for block in self.blocks:
            for row in block.rows:
                units = block.weights if row.compared else None
                values = _values(self.scores.videos, block, row.method, measure.name, units)
                if values:
                    weights = {unit: block.weights.get(unit, 1.0) if row.compared else 1.0 for unit in values}
                    column = np.array([[value] for value in values.values()])
                    (interval,) = intervals(*prompt_means(weights, column))
                    cell = Mean(interval, len(values))
                    found.setdefault(row.method, {})[block.backbone, block.latent_frames] = cell
        return found


def beside(
    shown: Suite[Any],
    runs: Sequence[Counted],
    methods: Mapping[str, Sequence[str]],
    given: Sequence[Suite[Any]] = (),
) -> Iterator[Judged]:
    """Suites besides the shown one whose tables belong on every page and that have answers."""
    known = {suite.folder: suite for suite in given}
    for name in registered():
        kind = suite_class(name)
        for variant in kind.variants() if kind.beside else ():
            suite, scores = known.get(variant.folder, variant), Scores()
            if suite.folder == shown.folder:
                continue
            for run in runs:
                run.read(suite, scores)
            if scores.videos or scores.failures:
                yield judged(suite.shown(scores), scores, methods)


def judged(suite: Suite[Any], scores: Scores, methods: Mapping[str, Sequence[str]]) -> Judged:
    """A suite's answers in cells."""
    blocks = [
        block
        for backbone, names in methods.items()
        for block in average_ranks(
            (video for video in scores.videos if video.backbone == backbone), names, suite.measures, suite.pooling
        )
    ]
    return Judged(suite, scores, blocks)


def judged_csv(found: Sequence[Judged], seconds: Mapping[tuple[str, int], float]) -> str:
    """One line per suite, measure, backbone, duration and method; `seconds` by backbone and latent frames."""
    columns = ["suite", "measure", "backbone", "duration_s", "method", "mean", "lower", "upper", "videos"]
    rows = (
        dict(
            zip(
                columns,
                (each.suite.title, measure.name, cell[0], seconds[cell], method, *mean.interval, mean.videos),
                strict=True,
            )
        )
        for each in found
        for measure in each.suite.measures
        for method, cells in each.means(measure).items()
        for cell, mean in cells.items()
    )
    return csv_text(columns, rows)


def _values(
    videos: Sequence[VideoScore], block: RankBlock, method: str, measure: str, units: Mapping[Unit, float] | None
) -> dict[Unit, float]:
    return {
        video.unit: video.values[measure]
        for video in videos
        if (video.backbone, video.latent_frames, video.method) == (block.backbone, block.latent_frames, method)
        and measure in video.values
        and (units is None or video.unit in units)
    }

"""Average ranks: methods against one another, per backbone and duration, over the prompts that all of them have.

Per block (backbone, duration): a unit (prompt, sample) counts if every compared method has a value for it in every
dimension. The units are averaged per dimension, methods are ranked per dimension on the unrounded means (1 is best,
ties share the mean of their places), and the ranks are averaged over the dimensions. This is the paper's Table 2
"Avg. Rank". A method without such units, or without any in common with the others, is left out of the comparison: it
has no ranks, and its means are over its own videos.

How units are averaged is the suite's choice. ``clips``: the unweighted mean over all clips of the units, which is the
official VBench-Long score (and what the paper prints) restricted to the units that all methods have. ``prompts``:
samples within their prompt, then prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lrag_ray.scoring.measure import Measure

Pooling = Literal["prompts", "clips"]

Unit = tuple[str, int]
"""Prompt id and sample: what methods are paired on."""


class VideoScore(NamedTuple):
    """Values of one video."""

    backbone: str
    method: str
    latent_frames: int
    """The duration."""
    prompt_id: str
    sample: int
    values: Mapping[str, float]
    """By measure name."""
    clips: int = 1
    """Clips that the values are means of."""

    @property
    def unit(self) -> Unit:
        """What it is paired on."""
        return self.prompt_id, self.sample


@dataclass(frozen=True)
class MethodRank:
    """One row of a rank table; `average_rank` is None where there is nothing to compare it with."""

    method: str
    means: Mapping[str, float]
    """Unrounded mean by measure name: over the common units, which is what is ranked, or over its own where the method
    is left out."""
    video_means: Mapping[str, float]
    """Mean of the per-video values of the common units, in which a video of many clips weighs no more than another."""
    ranks: Mapping[str, float]
    """Place by measure name; 1 is best."""
    average_rank: float | None
    videos_scored: int
    """Videos of this method that have scores, common or not."""
    compared: bool
    """Whether the common units are units of this method."""
    prompts: int
    """Prompts behind its means."""
    videos: int
    """Videos behind its means."""


@dataclass(frozen=True)
class RankBlock:
    """Methods of one backbone at one duration."""

    backbone: str
    latent_frames: int
    prompts: int
    """Prompts that every compared method has; what is ranked is over these alone."""
    videos: int
    """Videos per compared method behind the table: common (prompt, sample) pairs."""
    prompts_left_out: int
    """Prompts that some compared methods have and others lack."""
    rows: Sequence[MethodRank]
    """In the order in which the methods were given."""
    weights: Mapping[Unit, float]
    """The common units, sorted, and what each weighs in the means."""

    @property
    def compared(self) -> list[MethodRank]:
        """The rows that are over the common units."""
        return [row for row in self.rows if row.compared]


def rank_means(means: Mapping[str, Mapping[str, float]], measures: Sequence[Measure]) -> dict[str, dict[str, float]]:
    """Place of every method (outer key) in every measure (inner key), from unrounded means; ties share a place."""
    ranks: dict[str, dict[str, float]] = {method: {} for method in means}
    for measure in measures:
        sign = -1 if measure.higher_is_better else 1
        column = {method: sign * values[measure.name] for method, values in means.items()}
        for method, value in column.items():
            better = sum(other < value for other in column.values())
            equal = sum(other == value for other in column.values())
            ranks[method][measure.name] = better + (equal + 1) / 2
    return ranks


def average_ranks(
    scores: Iterable[VideoScore], methods: Sequence[str], measures: Sequence[Measure], pooling: Pooling = "prompts"
) -> list[RankBlock]:
    """Rank `methods` in every (backbone, duration) that `scores` touch.

    A value that is missing or not finite takes its video out of the comparison. Methods left out of it have no ranks;
    while the others have no common unit, the one with the fewest complete videos is left out too.
    """
    blocks: dict[tuple[str, int], dict[str, dict[Unit, VideoScore]]] = {}
    for score in scores:
        if score.method in methods:
            block = blocks.setdefault((score.backbone, score.latent_frames), {method: {} for method in methods})
            block[score.method][score.unit] = score
    return [_ranked(*key, blocks[key], measures, pooling) for key in sorted(blocks)]


def without_ranks(block: RankBlock) -> RankBlock:
    """The same means without places, for values that are not to be ranked."""
    return replace(block, rows=[replace(row, ranks={}, average_rank=None) for row in block.rows])


def _ranked(
    backbone: str,
    latent_frames: int,
    block: Mapping[str, Mapping[Unit, VideoScore]],
    measures: Sequence[Measure],
    pooling: Pooling,
) -> RankBlock:
    complete = {
        method: {
            unit
            for unit, video in videos.items()
            if all(math.isfinite(video.values.get(measure.name, math.nan)) for measure in measures)
        }
        for method, videos in block.items()
    }
    compared = _comparable(complete)
    common = sorted(set.intersection(*(complete[method] for method in compared))) if compared else []
    weights = _weights(common, block[compared[0]], pooling) if compared else {}
    ranked = {method: _means(block[method], weights, measures) for method in compared}
    ranks = rank_means(ranked, measures)
    rows = []
    for method, videos in block.items():
        own = weights if method in ranked else _weights(sorted(videos), videos, pooling)
        places = ranks.get(method)
        rows.append(
            MethodRank(
                method=method,
                means=ranked[method] if method in ranked else _means(videos, own, measures),
                video_means=_means(videos, dict.fromkeys(own, 1.0), measures),
                ranks=places or {},
                average_rank=math.fsum(places.values()) / len(measures) if places else None,
                videos_scored=len(videos),
                compared=method in ranked,
                prompts=len({prompt for prompt, _ in own}),
                videos=len(own),
            )
        )
    prompts = {prompt for prompt, _ in common}
    seen = {prompt for method in compared for prompt, _ in block[method]}
    return RankBlock(backbone, latent_frames, len(prompts), len(common), len(seen - prompts), rows, weights)


def _comparable(complete: Mapping[str, set[Unit]]) -> list[str]:
    """Methods that have units in common, in their order; none where only one of several is left.

    Those with the fewest units are left out until the others have some in common.
    """
    kept = [method for method, units in complete.items() if units]
    while kept and not set.intersection(*(complete[method] for method in kept)):
        fewest = min(len(complete[method]) for method in kept)
        kept.remove([method for method in kept if len(complete[method]) == fewest][-1])
    # One alone has no rank beside methods that it cannot be compared with.
    return kept if len(kept) > 1 or len(complete) == 1 else []


def _weights(units: Sequence[Unit], videos: Mapping[Unit, VideoScore], pooling: Pooling) -> dict[Unit, float]:
    """What each unit weighs. All videos of a block have one length, so any method's clips will do."""
    samples = Counter(prompt for prompt, _ in units)
    return {unit: float(videos[unit].clips) if pooling == "clips" else 1 / samples[unit[0]] for unit in units}


def _means(
    videos: Mapping[Unit, VideoScore], weights: Mapping[Unit, float], measures: Sequence[Measure]
) -> dict[str, float]:
    """Weighted means by measure name over the videos that have it; fsum, so that equal videos tie in any order."""
    means = {}
    for measure in measures:
        values = {unit: videos[unit].values.get(measure.name, math.nan) for unit in weights}
        there = {unit: value for unit, value in values.items() if math.isfinite(value)}
        if total := math.fsum(weights[unit] for unit in there):
            means[measure.name] = math.fsum(weights[unit] * value for unit, value in there.items()) / total
    return means

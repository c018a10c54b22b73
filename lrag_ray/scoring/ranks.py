"""Average ranks: methods against one another, per backbone and duration, over the prompts that all of them have.

Per block (backbone, duration): a unit (prompt, sample) counts if every compared method has a value for it in every
dimension; the units are averaged per dimension, methods are ranked per dimension on the unrounded means (1 is best,
ties share the mean of their places), and the ranks are averaged over the dimensions. This is the paper's Table 2
"Avg. Rank".

How units are averaged is the suite's choice. ``clips``: the unweighted mean over all clips of the units, which is the
official VBench-Long score (and what the paper prints) restricted to the units that all methods have. ``prompts``:
samples within their prompt, then prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    """One row of a rank table; `average_rank` is None where the block has no common prompt."""

    method: str
    means: Mapping[str, float]
    """Unrounded mean over the common units, by measure name; what is ranked."""
    video_means: Mapping[str, float]
    """Mean of the per-video values of the common units, in which a video of many clips weighs no more than another."""
    ranks: Mapping[str, float]
    """Place by measure name; 1 is best."""
    average_rank: float | None
    videos_scored: int
    """Videos of this method that have scores, common or not."""


@dataclass(frozen=True)
class RankBlock:
    """Methods of one backbone at one duration."""

    backbone: str
    latent_frames: int
    prompts: int
    """Prompts that every method has; the table is over these alone."""
    videos: int
    """Videos per method behind the table: common (prompt, sample) pairs."""
    prompts_left_out: int
    """Prompts that some methods have and others lack."""
    rows: Sequence[MethodRank]
    """In the order in which the methods were given."""
    weights: Mapping[Unit, float]
    """The common units, sorted, and what each weighs in the means."""


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

    A method without a score keeps the block from being ranked (no common prompts) instead of dropping out of it. A
    value that is missing or not finite takes its video out of the comparison.
    """
    blocks: dict[tuple[str, int], dict[str, dict[Unit, VideoScore]]] = {}
    for score in scores:
        if score.method in methods:
            block = blocks.setdefault((score.backbone, score.latent_frames), {method: {} for method in methods})
            block[score.method][score.unit] = score
    return [_ranked(*key, blocks[key], measures, pooling) for key in sorted(blocks)]


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
    common = sorted(set.intersection(*complete.values()))
    samples = Counter(prompt for prompt, _ in common)
    # All videos of a block have one length, so any method's clips will do.
    clips = next(iter(block.values()))
    weights = {unit: float(clips[unit].clips) if pooling == "clips" else 1 / samples[unit[0]] for unit in common}
    seen = {prompt for videos in block.values() for prompt, _ in videos}
    ranked = block if common else {}
    means = {method: _means(videos, weights, measures) for method, videos in ranked.items()}
    equal = dict.fromkeys(common, 1.0)
    video_means = {method: _means(videos, equal, measures) for method, videos in ranked.items()}
    ranks = rank_means(means, measures)
    rows = [
        MethodRank(
            method=method,
            means=means.get(method, {}),
            video_means=video_means.get(method, {}),
            ranks=ranks.get(method, {}),
            average_rank=math.fsum(ranks[method].values()) / len(measures) if common else None,
            videos_scored=len(videos),
        )
        for method, videos in block.items()
    ]
    return RankBlock(backbone, latent_frames, len(samples), len(common), len(seen) - len(samples), rows, weights)


def _means(
    videos: Mapping[Unit, VideoScore], weights: Mapping[Unit, float], measures: Sequence[Measure]
) -> dict[str, float]:
    """Weighted means by measure name; fsum, so that equal videos tie whatever their order."""
    total = math.fsum(weights.values())
    return {
        measure.name: math.fsum(weight * videos[unit].values[measure.name] for unit, weight in weights.items()) / total
        for measure in measures
    }

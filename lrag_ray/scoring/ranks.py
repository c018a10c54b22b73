"""Average ranks: methods against one another, per backbone and duration, over the prompts that all of them have.

Per block (backbone, duration): a unit (prompt, sample) counts if every compared method has a value for it in every
dimension; samples are averaged within their prompt, prompts are averaged per dimension, methods are ranked per
dimension on the unrounded means (1 is best, ties share the mean of their places), and the ranks are averaged over the
dimensions. This is the paper's Table 2 "Avg. Rank".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lrag_ray.scoring.measure import Measure


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


@dataclass(frozen=True)
class MethodRank:
    """One row of a rank table; `average_rank` is None where the block has no common prompt."""

    method: str
    means: Mapping[str, float]
    """Unrounded mean over the common prompts, by measure name."""
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


def average_ranks(scores: Iterable[VideoScore], methods: Sequence[str], measures: Sequence[Measure]) -> list[RankBlock]:
    """Rank `methods` in every (backbone, duration) that `scores` touch.

    A method without a score keeps the block from being ranked (no common prompts) instead of dropping out of it. A
    value that is missing or not finite takes its video out of the comparison.
    """
    blocks: dict[tuple[str, int], dict[str, dict[tuple[str, int], Mapping[str, float]]]] = {}
    for score in scores:
        if score.method in methods:
            block = blocks.setdefault((score.backbone, score.latent_frames), {method: {} for method in methods})
            block[score.method][score.prompt_id, score.sample] = score.values
    return [_ranked(*key, blocks[key], measures) for key in sorted(blocks)]


def _ranked(
    backbone: str,
    latent_frames: int,
    block: Mapping[str, Mapping[tuple[str, int], Mapping[str, float]]],
    measures: Sequence[Measure],
) -> RankBlock:
    complete = {
        method: {
            unit
            for unit, values in videos.items()
            if all(math.isfinite(values.get(measure.name, math.nan)) for measure in measures)
        }
        for method, videos in block.items()
    }
    common = set.intersection(*complete.values())
    prompts = sorted({prompt for prompt, _ in common})
    seen = {prompt for videos in block.values() for prompt, _ in videos}
    means = {
        method: {measure.name: _mean_over_prompts(videos, common, prompts, measure.name) for measure in measures}
        for method, videos in block.items()
        if prompts
    }
    ranks = rank_means(means, measures)
    rows = [
        MethodRank(
            method=method,
            means=means.get(method, {}),
            ranks=ranks.get(method, {}),
            average_rank=math.fsum(ranks[method].values()) / len(measures) if prompts else None,
            videos_scored=len(videos),
        )
        for method, videos in block.items()
    ]
    return RankBlock(backbone, latent_frames, len(prompts), len(common), len(seen) - len(prompts), rows)


def _mean_over_prompts(
    videos: Mapping[tuple[str, int], Mapping[str, float]],
    common: set[tuple[str, int]],
    prompts: Sequence[str],
    name: str,
) -> float:
    """Mean over prompts of the mean over samples; fsum, so that equal videos tie whatever their order."""
    per_prompt = []
    for prompt in prompts:
        values = [videos[unit][name] for unit in sorted(common) if unit[0] == prompt]
        per_prompt.append(math.fsum(values) / len(values))
    return math.fsum(per_prompt) / len(per_prompt)

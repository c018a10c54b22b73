"""Differences between methods, and the noise between samples, for every rank table.

Which methods are compared follows their policies, not their names in the run: every method with the first setting of
``base``, and every method with a memory of its own with the first setting of ``infinity_rope``, which is what retrieval
without a memory comes to. The leader is compared with the next method too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrag_ray.scoring.bootstrap import (
    LEAST_PROMPTS,
    Interval,
    intervals,
    lead_shares,
    prompt_means,
    sample_noise,
)
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import RankBlock, Unit, VideoScore
from lrag_ray.store.identity import MethodIdentity

_WITHOUT_MEMORY = frozenset({"base", "rolling_sink", "infinity_rope", "deep_forcing"})


@dataclass(frozen=True)
class Contrast:
    """One method minus another in one rank table."""

    method: str
    reference: str
    intervals: Mapping[str, Interval]
    """By measure name, over the prompts of the table."""


@dataclass(frozen=True)
class Lead:
    """Which method has the lowest average rank of a table, and how sure that is."""

    methods: Sequence[str]
    """One, or several that share the rank."""
    average_rank: float
    over: Contrast | None
    """The leader minus the next method; None where several lead or no other is ranked."""
    tied: Sequence[str]
    """Methods that share the next place with the one in `over`."""
    share: float | None
    """Of 1000 draws of the prompts with replacement, those in which the leader leads; None where several lead or the
    prompts are fewer than `LEAST_PROMPTS`."""


@dataclass(frozen=True)
class BlockStatistics:
    """What stands beside the means of a rank table."""

    contrasts: Sequence[Contrast]
    noise: Mapping[tuple[str, str], float]
    """By (method, measure): standard deviation between the samples of a prompt; empty where all have one sample."""
    lead: Lead | None = None
    """None where nothing is ranked."""


def pairs(methods: Mapping[str, MethodIdentity]) -> list[tuple[str, str]]:
    """(method, reference) of the contrasts with a reference, those with ``base`` first."""
    found = []
    for reference_policy in ("base", "infinity_rope"):
        reference = next((name for name, method in methods.items() if method.method == reference_policy), None)
        for name, method in methods.items():
            compared = reference_policy == "base" or method.method not in _WITHOUT_MEMORY
            if reference is not None and name != reference and compared:
                found.append((name, reference))
    return found


def block_statistics(
    block: RankBlock,
    scores: Iterable[VideoScore],
    methods: Mapping[str, MethodIdentity],
    measures: Sequence[Measure],
) -> BlockStatistics:
    """Contrasts and noise over the common units of `block`; `scores` hold at least its own."""
    values: dict[str, dict[Unit, VideoScore]] = {row.method: {} for row in block.compared}
    for score in scores:
        if (score.backbone, score.latent_frames) == (block.backbone, block.latent_frames) and score.method in values:
            values[score.method][score.unit] = score
    if not block.weights:
        return BlockStatistics([], {})
    table = {
        method: np.array([[found[unit].values[measure.name] for measure in measures] for unit in block.weights])
        for method, found in values.items()
    }
    names = [measure.name for measure in measures]

    def contrast(method: str, reference: str) -> Contrast:
        weights, per_prompt = prompt_means(block.weights, table[method] - table[reference])
        return Contrast(method, reference, dict(zip(names, intervals(weights, per_prompt), strict=True)))

    contrasts = [contrast(*pair) for pair in pairs({name: methods[name] for name in values})]
    noise = {
        (method, measure.name): deviation
        for method, columns in table.items()
        for measure, column in zip(measures, columns.T, strict=True)
        if (deviation := sample_noise(dict(zip(block.weights, column.tolist(), strict=True)))) is not None
    }
    lead = _lead(block, table, measures, contrast)
    if lead is not None and lead.over is not None and lead.over not in contrasts:
        contrasts.append(lead.over)
    return BlockStatistics(contrasts, noise, lead)


def _lead(
    block: RankBlock,
    table: Mapping[str, NDArray[np.float64]],
    measures: Sequence[Measure],
    contrast: Callable[[str, str], Contrast],
) -> Lead | None:
    """`table` holds values [units, measures] by method."""
    ranks = {row.method: row.average_rank for row in block.compared if row.average_rank is not None}
    if len(ranks) < 2:
        return None
    first, *others = sorted(ranks, key=lambda method: ranks[method])
    leaders = [first, *(method for method in others if ranks[method] <= ranks[first] + 1e-12)]
    if len(leaders) > 1:
        return Lead(leaders, ranks[first], None, (), None)
    share = None
    if block.prompts >= LEAST_PROMPTS:
        means = [prompt_means(block.weights, table[method]) for method in ranks]
        weights, columns = means[0][0], np.stack([found for _, found in means], axis=1)
        shares = lead_shares(weights, columns, [not measure.higher_is_better for measure in measures])
        share = float(shares[list(ranks).index(first)])
    second, *rest = others
    tied = [method for method in rest if ranks[method] <= ranks[second] + 1e-12]
    return Lead(leaders, ranks[first], contrast(first, second), tied, share)

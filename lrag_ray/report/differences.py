"""Differences between methods, and the noise between samples, for every rank table.

Which methods are compared follows their policies, not their names in the run: every method with the first setting of
``base``, and every method with a memory of its own with the first setting of ``infinity_rope``, which is what retrieval
without a memory comes to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrag_ray.scoring.bootstrap import Interval, intervals, prompt_means, sample_noise
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
class BlockStatistics:
    """What stands beside the means of a rank table."""

    contrasts: Sequence[Contrast]
    noise: Mapping[tuple[str, str], float]
    """By (method, measure): standard deviation between the samples of a prompt; empty where all have one sample."""


def pairs(methods: Mapping[str, MethodIdentity]) -> list[tuple[str, str]]:
    """(method, reference) of all contrasts, those with ``base`` first."""
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
    contrasts = []
    for method, reference in pairs({name: methods[name] for name in values}):
        weights, per_prompt = prompt_means(block.weights, table[method] - table[reference])
        found_intervals = intervals(weights, per_prompt)
        names = [measure.name for measure in measures]
        contrasts.append(Contrast(method, reference, dict(zip(names, found_intervals, strict=True))))
    noise = {
        (method, measure.name): deviation
        for method, columns in table.items()
        for measure, column in zip(measures, columns.T, strict=True)
        if (deviation := sample_noise(dict(zip(block.weights, column.tolist(), strict=True)))) is not None
    }
    return BlockStatistics(contrasts, noise)

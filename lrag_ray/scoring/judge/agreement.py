"""How far answers agree: Krippendorff's alpha, and the pull of a place in comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple


def krippendorff_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Alpha for interval data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    `units` are the values that one thing got from several raters; a rater may be missing anywhere, things with fewer
    than two values say nothing. 1 is perfect agreement, 0 what chance gives. None where all values are equal or there
    is nothing to compare.
    """
    paired = [values for values in map(list, units) if len(values) > 1]
    values = [value for group in paired for value in group]
    if len(values) < 2:
        return None
    n, total, squares = len(values), math.fsum(values), math.fsum(value**2 for value in values)
    # Sum over all ordered pairs of (a - b)^2 is 2 (n sum a^2 - (sum a)^2).
    expected = 2 * (n * squares - total**2) / (n * (n - 1))
    if expected <= 1e-12 * max(1.0, squares):
        return None
    observed = math.fsum(
        2 * math.fsum((a - b) ** 2 for a, b in combinations(group, 2)) / (len(group) - 1) for group in paired
    )
    return 1 - observed / n / expected


class PositionBias(NamedTuple):
    """What the place of a video does to a comparison."""

    pairs: int
    """Pairs that have an answer in both orders."""
    consistent: float
    """Share of them whose answers are the same whatever the order."""
    first: float
    """Mean share that the first place gets; 0.5 is no bias."""


def position_bias(pairs: Iterable[tuple[float, float]]) -> PositionBias | None:
    """From shares of one method per pair, when it came first and when it came second; None without pairs."""
    found = list(pairs)
    if not found:
        return None
    same = sum(came_first == came_second for came_first, came_second in found)
    first = math.fsum((came_first + 1 - came_second) / 2 for came_first, came_second in found)
    return PositionBias(len(found), same / len(found), first / len(found))

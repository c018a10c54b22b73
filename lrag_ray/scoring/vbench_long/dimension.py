"""What a dimension says of a clip, and why it may say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple


class UnscorableError(Exception):
    """A clip has no value in a dimension; the message is the reason."""


class Measured(NamedTuple):
    """Score of a clip and the values that it summarises."""

    score: float
    per_frame: tuple[float, ...]


def mean_of(values: Sequence[float], needs: str) -> Measured:
    """The mean of per-frame or per-pair values.

    Raises:
        UnscorableError: there are none; `needs` says what would be needed.
    """
    if not values:
        raise UnscorableError(f"needs {needs}")
    return Measured(fmean(values), tuple(values))

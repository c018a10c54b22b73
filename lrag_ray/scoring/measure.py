"""What a score is called, which way it points and where it lies: shared by all suites."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One dimension of a suite."""

    name: str
    """Column name in tables and files."""
    title: str
    """As people read it."""
    formula: str
    """What is computed, in one sentence."""
    lower: float
    """Least possible value."""
    upper: float
    """Greatest possible value; math.inf where there is none."""
    higher_is_better: bool
    """Direction for ranks."""

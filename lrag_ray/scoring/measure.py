"""What a score is called, which way it points and how it is shown: shared by all suites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """One column of a suite's tables."""

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
    unit: Literal["", "percent"] = ""
    """percent: files hold shares, and tables show them times 100 with two decimals, without the sign."""

"""Names of the dimensions and modes. Imports nothing, so that a configuration can be checked without torch."""

from __future__ import annotations

from typing import Literal, get_args

DimensionName = Literal[
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
]
DIMENSION_NAMES: tuple[DimensionName, ...] = get_args(DimensionName)
"""The six dimensions of `long_custom_input` that the paper reports, in its order."""

Mode = Literal["direct", "compat"]
"""direct: clips are cut from the decoded frames. compat: they are re-encoded as the official splitter does it."""

"""The six dimensions by name. A further one is a module with a `DIMENSION` and a line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lrag_ray.scoring.vbench_long import (
    aesthetic_quality,
    background_consistency,
    dynamic_degree,
    imaging_quality,
    motion_smoothness,
    subject_consistency,
)
from lrag_ray.scoring.vbench_long.dimension import Dimension
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES
from lrag_ray.scoring.vbench_long.official import NetworkName

DIMENSIONS: Mapping[str, Dimension] = {
    module.DIMENSION.name: module.DIMENSION
    for module in (
        subject_consistency,
        background_consistency,
        motion_smoothness,
        dynamic_degree,
        aesthetic_quality,
        imaging_quality,
    )
}
"""In the paper's order."""

assert tuple(DIMENSIONS) == DIMENSION_NAMES


def networks_of(dimensions: Iterable[str]) -> list[NetworkName]:
    """Networks that the dimensions need, each once."""
    return list(dict.fromkeys(network for name in dimensions for network in DIMENSIONS[name].all_networks))


def as_shares(scores: Mapping[str, float]) -> dict[str, float]:
    """Values by dimension, each from 0 to 1."""
    return {name: value / DIMENSIONS[name].full_scale for name, value in scores.items()}


def in_order(dimensions: Iterable[str]) -> Sequence[Dimension]:
    """The dimensions of these names, in the paper's order."""
    wanted = set(dimensions)
    return [dimension for name, dimension in DIMENSIONS.items() if name in wanted]

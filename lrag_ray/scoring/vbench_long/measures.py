"""The six dimensions of VBench-Long as measures of a suite: names, formulas, directions.

Files hold values from 0 to 1; tables show them times 100 with two decimals, as the paper's Table 2 does.
"""

from __future__ import annotations

from collections.abc import Collection

from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.table import Suite
from lrag_ray.scoring.vbench_long.rows import Dimension, Mode

_CONSISTENCY = (
    "Mean over the frames of a clip of the mean cosine similarity to the frame before and to the first frame ({inside}"
    "); averaged with the same over the first frames of all clips of the video ({across}), mapped to its scale"
)

MEASURES: dict[Dimension, Measure] = {
    "subject_consistency": Measure(
        "subject_consistency",
        "Subject consistency",
        _CONSISTENCY.format(inside="DINO ViT-B/16", across="DINOv2 ViT-B/14"),
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
    "background_consistency": Measure(
        "background_consistency",
        "Background consistency",
        _CONSISTENCY.format(inside="CLIP ViT-B/32", across="DreamSim"),
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
    "motion_smoothness": Measure(
        "motion_smoothness",
        "Motion smoothness",
        "1 - mean absolute difference, as a share of 255, between every second frame and what AMT-S interpolates "
        "from its neighbours",
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
    "dynamic_degree": Measure(
        "dynamic_degree",
        "Dynamic degree",
        "Share of the clips that move: in enough frame pairs, the strongest 5% of the RAFT flow pass a threshold",
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
    "aesthetic_quality": Measure(
        "aesthetic_quality",
        "Aesthetic quality",
        "Mean over frames of the LAION aesthetic predictor on CLIP ViT-L/14, as a share of 10",
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
    "imaging_quality": Measure(
        "imaging_quality",
        "Imaging quality",
        "Mean over frames of MUSIQ (SPAQ), as a share of 100",
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
}
"""In the paper's order. The networks may leave the range of aesthetic and imaging quality by a little."""

NAME = "vbench_long"


def vbench_long(mode: Mode, dimensions: Collection[str] = tuple(MEASURES)) -> Suite:
    """The suite in a mode, with those of its six dimensions that are in `dimensions`."""
    measures = [measure for name, measure in MEASURES.items() if name in dimensions]
    return Suite(NAME, 1, measures, mode=mode, percent=True, pooling="clips")

"""VBench-Long (`long_custom_input`): six dimensions of long videos.

::

    networks = Networks(WeightFiles(Path("weights")), "cuda")
    rows = [row for path in videos for row in score_video(VideoSource(path, str(path)), networks)]
    print(aggregate(rows).mean_over_clips)
"""

from lrag_ray.scoring.vbench_long.aggregate import Aggregate, ClipScore, Unscored, aggregate
from lrag_ray.scoring.vbench_long.networks import BatchSizes, Networks, Precision
from lrag_ray.scoring.vbench_long.official import NETWORKS, OFFICIAL, NetworkName
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.scoring.vbench_long.rows import DIMENSIONS, Dimension, Mode, RowKey, ScoreRow
from lrag_ray.scoring.vbench_long.score import ClipScorer, VideoSource, score_video
from lrag_ray.scoring.vbench_long.weights import WeightFiles, Weights, WeightSource

__all__ = [
    "DIMENSIONS",
    "NETWORKS",
    "OFFICIAL",
    "Aggregate",
    "BatchSizes",
    "ClipScore",
    "ClipScorer",
    "Dimension",
    "Mode",
    "NetworkName",
    "Networks",
    "Precision",
    "RandomWeights",
    "RowKey",
    "ScoreRow",
    "Unscored",
    "VideoSource",
    "WeightFiles",
    "WeightSource",
    "Weights",
    "aggregate",
    "score_video",
]

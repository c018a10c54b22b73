"""Arithmetic of VBench-Long, from sizes alone: what `plan` shows of a scoring that has not run.

A multiply-add counts as two floating-point operations; norms, activations, resizes and look-ups are left out. The
early stop of dynamic degree is not counted on, so a clip costs at most this. One clip of 2 s at 832x480 and 16 fps:

====================== ================== ========================= =========
dimension              network            runs on                     TFLOP
====================== ================== ========================= =========
subject consistency    DINO ViT-B/16      32 frames, 224x388            1.84
background consistency CLIP ViT-B/32      32 frames, 224x224            0.26
motion smoothness      AMT-S              15 pairs of even frames       1.54
dynamic degree         RAFT               15 pairs at 8 fps            10.43
aesthetic quality      CLIP ViT-L/14      32 frames, 224x224            5.00
imaging quality        MUSIQ              32 frames, 512x295            0.64
====================== ================== ========================= =========

Clip to clip, DINOv2 ViT-B/14 and the three towers of DreamSim see the first frame of each clip (0.14 TFLOP).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from lrag_ray.scoring.vbench_long.clips import ClipSpan, clip_length, spans
from lrag_ray.scoring.vbench_long.correlation import LEVELS
from lrag_ray.scoring.vbench_long.dynamic_degree import sampling_interval
from lrag_ray.scoring.vbench_long.imaging_quality import LONGER_SIDE
from lrag_ray.scoring.vbench_long.motion_smoothness import MULTIPLE
from lrag_ray.scoring.vbench_long.networks import (
    CLIP_B32,
    CLIP_L14,
    DINO,
    DINOV2,
    DREAMSIM_CLIP,
    DREAMSIM_DINO,
    DREAMSIM_OPEN_CLIP,
)
from lrag_ray.scoring.vbench_long.preprocess import SIDE
from lrag_ray.scoring.vbench_long.raft import STRIDE
from lrag_ray.scoring.vbench_long.vit import VitConfig

# RAFT and AMT-S are convolutions, linear in the positions of the feature maps at 1/8 of the resolution, and all-pairs
# correlations at several scales, quadratic in them. The constants are what torch counts (tests/scoring/test_flops.py).
_RAFT_FRAME = 8_697_856
"""Feature encoder, per position and frame."""
_RAFT_PAIR = 97_943_552
"""Context encoder, 20 iterations of the update block and the upsampling mask, per position and pair."""
_RAFT_CORRELATION = 2 * 256
"""Per pair of positions: 256 channels."""
_AMT_PAIR = 13_684_712
"""Everything but the correlation, per position and pair."""
_AMT_CORRELATION = 2 * 2 * 84
"""Per pair of positions: 84 channels, from either frame to the other."""

_MUSIQ_PATCH = 32
_MUSIQ_SCALES = (224, 384)
"""Longer sides that it sees besides the image itself."""
_MUSIQ_WIDTH, _MUSIQ_MLP, _MUSIQ_DEPTH = 384, 1152, 14
_MUSIQ_STEM = 26_836_992
"""Convolutions and embedding of one patch."""


def vit_flops(config: VitConfig, height: int, width: int) -> int:
    """Operations of a vision transformer on one image of `height` x `width` pixels."""
    patches = (height // config.patch) * (width // config.patch)
    n, d = patches + 1, config.width
    embedding = 2 * patches * 3 * config.patch**2 * d
    blocks = (config.depth - 1) * (24 * n * d * d + 4 * n * n * d)
    # Only the CLS token leaves the last block; keys and values are of all tokens.
    last = (4 * n + 20) * d * d + 4 * n * d
    return embedding + blocks + last + 2 * d * config.projection


def raft_flops(pairs: int, height: int, width: int) -> int:
    """Operations of RAFT on `pairs` neighbouring pairs of a run of frames, each frame encoded once."""
    rows, columns = _map(height, width, STRIDE)
    frames = _RAFT_FRAME * rows * columns * (pairs + 1)
    each = _RAFT_PAIR * rows * columns + _RAFT_CORRELATION * _correlated(rows, columns)
    return frames + pairs * each if pairs > 0 else 0


def amt_flops(height: int, width: int) -> int:
    """Operations of AMT-S for one frame between two."""
    rows, columns = _map(height, width, MULTIPLE)
    return _AMT_PAIR * rows * columns + _AMT_CORRELATION * _correlated(rows, columns)


def musiq_flops(height: int, width: int) -> int:
    """Operations of MUSIQ on one frame of any size."""
    longer = max(height, width)
    if longer > LONGER_SIDE:
        scale = LONGER_SIDE / longer
        height, width = int(scale * height), int(scale * width)
    scales = [1.0, *(side / max(height, width) for side in _MUSIQ_SCALES)]
    patches = sum(
        ceil(round(height * scale) / _MUSIQ_PATCH) * ceil(round(width * scale) / _MUSIQ_PATCH) for scale in scales
    )
    n, d = patches + 1, _MUSIQ_WIDTH
    block = 2 * n * (4 * d * d + 2 * d * _MUSIQ_MLP) + 4 * n * n * d
    # Only the CLS token leaves the last block; keys and values are of all tokens.
    last = 4 * n * d * d + 4 * d * d + 4 * d * _MUSIQ_MLP + 4 * n * d
    return _MUSIQ_STEM * patches + (_MUSIQ_DEPTH - 1) * block + last + 2 * d


def clip_flops(frames: int, fps: int, height: int, width: int) -> int:
    """Operations of all six dimensions on one clip."""
    shorter = min(height, width)
    dino = vit_flops(DINO, int(SIDE * height / shorter), int(SIDE * width / shorter))
    each_frame = dino + vit_flops(CLIP_B32, SIDE, SIDE) + vit_flops(CLIP_L14, SIDE, SIDE) + musiq_flops(height, width)
    # The rating of a frame by LAION's linear layer is 2 * 768 operations.
    each_frame += 2 * CLIP_L14.projection
    predicted = max(0, ceil(frames / 2) - 1)
    pairs = ceil(frames / sampling_interval(fps)) - 1
    return frames * each_frame + predicted * amt_flops(height, width) + raft_flops(pairs, height, width)


def clip_to_clip_flops() -> int:
    """Operations of both consistency dimensions on the first frame of one clip."""
    towers = (DINOV2, DREAMSIM_DINO, DREAMSIM_CLIP, DREAMSIM_OPEN_CLIP)
    return sum(vit_flops(tower, SIDE, SIDE) for tower in towers)


def vbench_flops(durations: Sequence[int], fps: int, height: int, width: int) -> int:
    """Operations to score one video and its prefixes, all of the given numbers of frames.

    Clips that durations share are scored once, as `score_video` does.
    """
    length = clip_length(fps)
    split = [spans(frames, length) for frames in durations]
    clips: set[ClipSpan] = set().union(*split)
    slow = sum(len(clips) for clips in split if len(clips) > 1)
    return sum(clip_flops(span.frame_count, fps, height, width) for span in clips) + slow * clip_to_clip_flops()


def _map(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Rows and columns at 1/8 of the resolution of frames that are padded to a multiple."""
    padded_height, padded_width = (-(-side // multiple) * multiple for side in (height, width))
    return padded_height // 8, padded_width // 8


def _correlated(rows: int, columns: int) -> int:
    """Pairs of positions that are correlated, at all scales of the second map."""
    return rows * columns * sum((rows >> level) * (columns >> level) for level in range(LEVELS))

"""The preview suite: cheap, training-free measures for demos, smoke runs and early drift alarms. Not VBench.

`MEASURES` is the documentation: formula, range and direction of each. Notation: Y is BT.709 luma in [0, 1] of the
decoded pixel values, C the chroma pair (Cb, Cr); *first* and *last* are the first and last eighth of the frames (at
least one); u_t is the optical flow from frame t to t + 1 (`lrag_ray.scoring.flow`) on frames of at most 128 px on
their longer side; <.> is the mean over pixels and frames. A still video has perfect smoothness and no drift: read
these together with the motion amount and the frozen share.

    from lrag_ray.scoring.preview.measures import measures
    from lrag_ray.video.mp4 import iterate_frames
    measures(iterate_frames("video.mp4"), fps=16)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lrag_ray.scoring.flow import LUMA, luma_of, optical_flow, reduced
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY, STILL_BELOW, Deviations, discontinuity
from lrag_ray.scoring.measure import Measure

MEASURES = (
    Measure(
        "exposure_drift",
        "Exposure drift",
        "|<Y> over last - <Y> over first|",
        lower=0,
        upper=1,
        higher_is_better=False,
    ),
    Measure(
        "colour_drift",
        "Colour drift",
        "Total variation distance between the 16 x 16-bin histograms of C over first and over last",
        lower=0,
        upper=1,
        higher_is_better=False,
    ),
    Measure(
        "sharpness",
        "Sharpness",
        "Root mean square over pixels of the gradient of Y (central differences), mean over frames; noise counts too",
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
    Measure(
        "sharpness_drift",
        "Sharpness drift",
        "1 - min(a, b) / max(a, b) for the sharpness a over first and b over last; 0 where both are 0",
        lower=0,
        upper=1,
        higher_is_better=False,
    ),
    Measure(
        "motion_amount",
        "Motion amount",
        "fps * <|u|> / frame diagonal: the share of the diagonal that the picture moves per second",
        lower=0,
        upper=math.inf,
        higher_is_better=True,
    ),
    Measure(
        "motion_smoothness",
        "Motion smoothness",
        "1 - <|u_(t+1) - u_t|> / <|u_(t+1)| + |u_t|>; 1 where nothing moves",
        lower=0,
        upper=1,
        higher_is_better=True,
    ),
    Measure(
        "flicker",
        "Flicker",
        "<|Y_(t-1) - 2 Y_t + Y_(t+1)|> / 2",
        lower=0,
        upper=1,
        higher_is_better=False,
    ),
    Measure(
        "frozen_share",
        "Frozen share",
        "Share of the frame pairs (t, t + 1) with <|Y_(t+1) - Y_t|> below 1/1000",
        lower=0,
        upper=1,
        higher_is_better=False,
    ),
)
"""The dimensions of the suite, in table order."""

_CHROMA_BINS = 16
_FROZEN_BELOW = 1e-3
_PAIRS_AT_ONCE = 64


class _FrameSummary:
    """What is kept of a frame, so that memory does not hold the video."""

    def __init__(self, frame: npt.NDArray[np.uint8]) -> None:
        rgb = torch.from_numpy(np.ascontiguousarray(frame)).float() / 255
        luma = luma_of(rgb)
        self.exposure = luma.mean().item()
        self.sharpness = _sharpness(luma)
        self.chroma = _chroma_histogram(rgb, luma)
        self.small = reduced(luma)


def measures(
    frames: Iterable[npt.NDArray[np.uint8]], fps: float, frames_per_block: int = 0, cold_chunk: int | None = None
) -> dict[str, float]:
    """Value of every measure for one video: uint8 RGB frames [H, W, 3], an array [T, H, W, 3] or a stream of them.

    With `frames_per_block`, the latent frames of a block, also the flow discontinuity where the video has one; see
    `lrag_ray.scoring.flow_discontinuity`.

    Raises:
        ValueError: there is no frame.
    """
    summaries = [_FrameSummary(frame) for frame in frames]
    if not summaries:
        raise ValueError("a video without frames cannot be measured")
    edge = max(1, len(summaries) // 8)
    first, last = summaries[:edge], summaries[-edge:]
    sharp_first, sharp_last = (_mean(part, "sharpness") for part in (first, last))
    sharpest = max(sharp_first, sharp_last)
    histograms = [torch.stack([frame.chroma for frame in part]).mean(0) for part in (first, last)]
    deviations = Deviations()
    values = {
        "exposure_drift": abs(_mean(last, "exposure") - _mean(first, "exposure")),
        "colour_drift": (histograms[0] - histograms[1]).abs().sum().item() / 2,
        "sharpness": _mean(summaries, "sharpness"),
        "sharpness_drift": 1 - min(sharp_first, sharp_last) / sharpest if sharpest > 0 else 0.0,
        **_temporal(torch.stack([frame.small for frame in summaries]), fps, deviations),
    }
    # Sums of float32 may pass a bound by their rounding.
    found = {m.name: min(max(values[m.name], m.lower), m.upper) for m in MEASURES}
    if frames_per_block:
        jumps = discontinuity(deviations.values, len(summaries), frames_per_block, cold_chunk)
        found |= {} if jumps is None else {FLOW_DISCONTINUITY.name: jumps}
    return found


def _temporal(luma: Tensor, fps: float, deviations: Deviations) -> dict[str, float]:
    """Measures of change over time from luma [T, h, w]; `deviations` gets the flow."""
    if len(luma) < 2:
        return {"motion_amount": 0.0, "motion_smoothness": 1.0, "flicker": 0.0, "frozen_share": 0.0}
    moved = jerk = doubled = 0.0
    previous: Tensor | None = None
    for start in range(0, len(luma) - 1, _PAIRS_AT_ONCE):
        pairs = luma[start : start + _PAIRS_AT_ONCE + 1]
        flow = optical_flow(pairs[:-1], pairs[1:])
        deviations.add_flow(flow)
        moved += flow.norm(dim=1).mean((1, 2)).sum().item()
        # The last flow of the piece before joins the pieces, so that the cut does not matter.
        joined = flow if previous is None else torch.cat([previous, flow])
        jerk += (joined[1:] - joined[:-1]).norm(dim=1).mean((1, 2)).sum().item()
        length = joined.norm(dim=1).mean((1, 2))
        doubled += (length[1:] + length[:-1]).sum().item()
        previous = flow[-1:]
    pairs_count = len(luma) - 1
    change = (luma[1:] - luma[:-1]).abs().mean((1, 2))
    second = luma[2:] - 2 * luma[1:-1] + luma[:-2]
    return {
        "motion_amount": fps * moved / pairs_count / math.hypot(*luma.shape[1:]),
        "motion_smoothness": 1 - jerk / doubled if moved / pairs_count > STILL_BELOW and doubled else 1.0,
        "flicker": second.abs().mean().item() / 2 if len(luma) > 2 else 0.0,
        "frozen_share": (change < _FROZEN_BELOW).float().mean().item(),
    }


def _mean(frames: list[_FrameSummary], attribute: str) -> float:
    return math.fsum(getattr(frame, attribute) for frame in frames) / len(frames)


def _sharpness(luma: Tensor) -> float:
    padded = F.pad(luma[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
    gx = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    gy = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    return (gx.square() + gy.square()).mean().sqrt().item()


def _chroma_histogram(rgb: Tensor, luma: Tensor) -> Tensor:
    """Shares of the pixels per (Cb, Cr) bin; both are in [-0.5, 0.5]."""
    cb = (rgb[..., 2] - luma) / (2 * (1 - LUMA[2]))
    cr = (rgb[..., 0] - luma) / (2 * (1 - LUMA[0]))
    b, r = (((c + 0.5) * _CHROMA_BINS).long().clamp(0, _CHROMA_BINS - 1) for c in (cb, cr))
    counts = torch.bincount((b * _CHROMA_BINS + r).flatten(), minlength=_CHROMA_BINS**2)
    return counts / counts.sum()

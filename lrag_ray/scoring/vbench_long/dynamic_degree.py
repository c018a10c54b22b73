"""Dynamic degree: whether enough pairs of frames hold fast motion, by RAFT flow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from lrag_ray.scoring.vbench_long.correlation import pairs_at_once
from lrag_ray.scoring.vbench_long.dimension import Dimension, Measured, UnscorableClipError
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames, pad_to_multiple
from lrag_ray.scoring.vbench_long.raft import MIN_SIDE, STRIDE

SAMPLED_FPS = 8
FASTEST = 0.05
"""Share of the pixels that are averaged, the fastest ones."""


def sampling_interval(fps: int) -> int:
    """Every how many frames one is used; halves round to even, as Python does."""
    return max(1, round(fps / SAMPLED_FPS))


def threshold(height: int, width: int) -> float:
    """Pixels of motion that a pair must exceed."""
    return 6.0 * (min(height, width) / 256)


def pairs_needed(frames_used: int) -> int:
    """Pairs over the threshold that make a clip dynamic."""
    return round(4 * (frames_used / 16))


def radii(frames: ClipFrames, networks: Networks) -> Iterator[list[float]]:
    """Mean flow of the fastest pixels per pair, in pixels, batch by batch."""
    height, width = frames.uint8.shape[2:]
    used = frames.uint8[:: sampling_interval(frames.fps)]
    if len(used) < 2:
        return
    padded, _ = pad_to_multiple(used.float(), STRIDE)
    if min(padded.shape[2:]) < MIN_SIDE:
        raise UnscorableClipError(f"frames of {width}x{height} are too small for RAFT, which needs sides of {MIN_SIDE}")
    for flow in networks.raft.flows(padded, pairs_at_once(networks.batch.pairs, *padded.shape[2:])):
        yield _radius(flow)


def _radius(flow: Tensor) -> list[float]:
    # The padded border counts, as in the official code.
    speed = flow.square().sum(dim=1).sqrt().flatten(1)
    values: list[float] = speed.topk(int(speed.shape[1] * FASTEST), dim=1).values.double().mean(dim=1).tolist()
    return values


def score(frames: ClipFrames, networks: Networks, *, early_stop: bool = True) -> Measured:
    """1.0 if the clip is dynamic, else 0.0; per pair the radius.

    With `early_stop` pairs are computed until the decision is certain, and `per_frame` ends there.
    """
    used = len(range(0, len(frames), sampling_interval(frames.fps)))
    limit, needed = threshold(*frames.uint8.shape[2:]), pairs_needed(used)
    seen: list[float] = []
    for batch in radii(frames, networks):
        seen += batch
        over, left = sum(radius > limit for radius in seen), used - 1 - len(seen)
        if early_stop and (over >= needed or over + left < needed):
            break
    over = sum(radius > limit for radius in seen)
    # The official check runs after each pair: a clip that needs none is dynamic by its first pair, one without a pair
    # is not.
    return Measured(float(bool(seen) and over >= needed), tuple(seen))


DIMENSION = Dimension(
    name="dynamic_degree",
    title="Dynamic degree",
    formula="Share of the clips that move: in enough frame pairs, the strongest 5% of the RAFT flow pass a threshold",
    networks=("raft_things",),
    score=score,
    score_in_full=partial(score, early_stop=False),
)

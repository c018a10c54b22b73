"""Speed of VBench-Long scoring: clips per second and dimension, share of decoding, and the official loops beside it.

The official loops decode the clip once more for every dimension and feed the networks as VBench does: one frame or
pair at a time, except for CLIP. Both use the same networks in the same precision, so that the ratio is the flow's.
Example::

    print(json.dumps(bench_scoring(["clip.mp4"], Networks(RandomWeights(), "cuda")).as_dict()))
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrag_ray.scoring.vbench_long import (
    DIMENSIONS,
    BatchSizes,
    ClipScorer,
    Dimension,
    Networks,
    dynamic_degree,
    imaging_quality,
    preprocess,
)
from lrag_ray.scoring.vbench_long.clips import Clip, clip_length, cut
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.raft import ITERATIONS


@dataclass(frozen=True)
class ScoringBench:
    """What scoring took."""

    device: str
    precision: str
    torch: str
    threads: int
    """Threads of torch on the CPU."""
    batch: BatchSizes
    early_stop: bool
    """Whether dynamic_degree ended once its decision was certain."""
    clips: int
    frames_per_clip: int
    width: int
    height: int
    decode_s: float
    seconds: dict[str, float]
    """Per dimension, for all clips, without decoding."""
    clips_per_s: dict[str, float]
    total_s: float
    decode_share: float
    """Of `total_s`."""
    official_seconds: dict[str, float]
    """Per dimension, decoding included; empty where the official loops were not run."""
    speedup: float | None
    """Official seconds over ours, all dimensions."""
    largest_difference: dict[str, float]
    """Between our scores and those of the official loops."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bench_scoring(
    videos: Sequence[str | Path],
    networks: Networks,
    *,
    dimensions: Sequence[Dimension] = DIMENSIONS,
    official: bool = False,
    early_stop: bool = True,
) -> ScoringBench:
    """Time the in-clip scores of all clips of `videos` in mode direct, after one warm-up clip.

    With `official` the official loops run on the same clips too.
    """
    clips: list[tuple[Clip, int]] = []
    start = time.perf_counter()
    for path in videos:
        fps = probe(path).fps
        clips += [(clip, int(fps)) for clip in cut(decode(path), clip_length(fps))]
    decode_s = time.perf_counter() - start

    scores: dict[str, list[float]] = {name: [] for name in dimensions}
    seconds: dict[str, float] = {}
    for name in dimensions:
        _ours(name, *clips[0], networks, early_stop)
        start = _now(networks)
        scores[name] = [_ours(name, clip, fps, networks, early_stop) for clip, fps in clips]
        seconds[name] = _now(networks) - start

    official_seconds: dict[str, float] = {}
    difference: dict[str, float] = {}
    if official:
        per_decode = decode_s / len(clips)
        for name in dimensions:
            _theirs(name, *clips[0], networks)
            start = _now(networks)
            found = [_theirs(name, clip, fps, networks) for clip, fps in clips]
            official_seconds[name] = _now(networks) - start + per_decode * len(clips)
            difference[name] = max(abs(a - b) for a, b in zip(found, scores[name], strict=True))

    total = decode_s + sum(seconds.values())
    height, width = clips[0][0].frames[0].shape[:2]
    return ScoringBench(
        device=networks.device_kind,
        precision=networks.precision,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        batch=networks.batch,
        early_stop=early_stop,
        clips=len(clips),
        frames_per_clip=clips[0][0].span.frame_count,
        width=width,
        height=height,
        decode_s=decode_s,
        seconds=seconds,
        clips_per_s={name: len(clips) / value for name, value in seconds.items()},
        total_s=total,
        decode_share=decode_s / total,
        official_seconds=official_seconds,
        speedup=sum(official_seconds.values()) / total if official else None,
        largest_difference=difference,
    )


def _now(networks: Networks) -> float:
    if networks.device.type == "cuda":
        torch.cuda.synchronize(networks.device)
    return time.perf_counter()


def _ours(name: Dimension, clip: Clip, fps: int, networks: Networks, early_stop: bool) -> float:
    scorer = ClipScorer("bench", networks, fps, early_stop=early_stop)
    (row,) = scorer.clip(clip.span, clip.frames, [name])
    if row.score is None:
        raise ValueError(f"{name} has no score for this clip: {row.reason}")
    return row.score


def _theirs(name: Dimension, clip: Clip, fps: int, networks: Networks) -> float:
    with networks.numerics(), warnings.catch_warnings():
        # VBench's loops use calls that torch has deprecated.
        warnings.simplefilter("ignore")
        frames = preprocess.ClipFrames(clip.frames, fps, networks.device)
        return _OFFICIAL_LOOPS[name](frames, networks)


def _subject(frames: preprocess.ClipFrames, networks: Networks) -> float:
    images = preprocess.resize_shorter(frames.uint8.float(), preprocess.SIDE, "bilinear", antialias=False) / 255
    images = preprocess.normalise(images, preprocess.IMAGENET)
    return _one_by_one([F.normalize(networks.dino(image[None]), dim=1) for image in images])


def _background(frames: preprocess.ClipFrames, networks: Networks) -> float:
    features = networks.clip_features(networks.clip_b32, frames.clip_input)
    return _one_by_one(list(F.normalize(features, dim=1).split(1)))


def _one_by_one(features: list[Tensor]) -> float:
    values = []
    for before, now in pairwise(features):
        to_previous = max(0.0, F.cosine_similarity(before, now).item())
        values.append((to_previous + max(0.0, F.cosine_similarity(features[0], now).item())) / 2)
    return fmean(values)


def _motion(frames: preprocess.ClipFrames, networks: Networks) -> float:
    height, width = frames.uint8.shape[2:]
    padded, (top, left) = preprocess.pad_to_multiple(frames.uint8[::2].float() / 255, 16)
    halfway = padded.new_full((1, 1, 1, 1), 0.5)
    errors = []
    for index, (before, after) in enumerate(zip(padded[:-1].split(1), padded[1:].split(1), strict=True)):
        image = networks.amt(before, after, halfway, scale_factor=1.0, eval=True)["imgt_pred"].cpu()
        image = (image[0, :, top : top + height, left : left + width] * 255).clamp(0, 255).to(torch.uint8)
        errors.append((image.int() - frames.uint8[2 * index + 1].cpu().int()).abs().double().mean().item())
    return (255 - fmean(errors)) / 255


def _dynamic(frames: preprocess.ClipFrames, networks: Networks) -> float:
    used = frames.uint8[:: dynamic_degree.sampling_interval(frames.fps)].float()
    padded, _ = preprocess.pad_to_multiple(used, 8)
    over = 0
    for before, after in zip(padded[:-1].split(1), padded[1:].split(1), strict=True):
        _, flow = networks.raft.network(before, after, iters=ITERATIONS, test_mode=True)
        fastest = flow.cpu().square().sum(1).sqrt().flatten().sort(descending=True).values
        radius = fastest[: int(len(fastest) * dynamic_degree.FASTEST)].mean().item()
        over += radius > dynamic_degree.threshold(*frames.uint8.shape[2:])
    return float(over >= dynamic_degree.pairs_needed(len(used)))


def _aesthetic(frames: preprocess.ClipFrames, networks: Networks) -> float:
    features = networks.clip_features(networks.clip_l14, frames.clip_input)
    return float((networks.aesthetic_head(F.normalize(features, dim=1)) / 10).mean())


def _imaging(frames: preprocess.ClipFrames, networks: Networks) -> float:
    images = imaging_quality.shrink(frames.uint8.float())
    return fmean(float(networks.musiq(image[None])) for image in images)


_OFFICIAL_LOOPS: Mapping[Dimension, Callable[[preprocess.ClipFrames, Networks], float]] = {
    "subject_consistency": _subject,
    "background_consistency": _background,
    "motion_smoothness": _motion,
    "dynamic_degree": _dynamic,
    "aesthetic_quality": _aesthetic,
    "imaging_quality": _imaging,
}

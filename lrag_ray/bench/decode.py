"""Speed of the video decoder by precision, layout and kernel, and what each changes: PSNR and VBench scores against
float32.

Run as ``lrag-ray bench decode``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrag_ray.config.schema import BackboneConfig
from lrag_ray.scoring.vbench_long.clips import clip_length, cut
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.score import ClipScorer
from lrag_ray.stages.backbone import load_vae
from lrag_ray.video.decode import Frames, StreamingDecoder
from lrag_ray.wan import norm_silu
from lrag_ray.wan.vae import WanVae


class Variant(NamedTuple):
    """How the decoder computes."""

    dtype: Literal["float32", "bfloat16", "float16"]
    channels_last: bool
    fused_norm: bool = False


VARIANTS = tuple(
    Variant(dtype, *layout)
    for dtype in ("float32", "bfloat16", "float16")
    for layout in ((False, False), (True, False), (True, True))
)
"""The first one is what the others are compared with."""


@dataclass(frozen=True)
class MeasuredDecode:
    """One variant."""

    dtype: str
    channels_last: bool
    fused_norm: bool
    fps: float
    """Video frames per second."""
    failed: str = ""
    """Why it made no frames; what follows is then absent."""
    psnr_db: float | None = None
    """Of all 8-bit frames against those of float32; None where they are equal."""
    psnr_worst_db: float | None = None
    """The same of the frame that differs most."""
    vbench: Mapping[str, float] | None = None
    """By dimension, mean over the clips minus that of float32; None without networks."""


def bench_decode(
    backbone: BackboneConfig,
    videos: Sequence[Tensor],
    device: torch.device,
    *,
    fps: int = 16,
    networks: Networks | None = None,
) -> list[MeasuredDecode]:
    """Decode latents `videos`, each [F, C, H, W], by every variant; `networks` score the clips of 2 s of each.

    Frames of one variant and of float32 are held in host memory.
    """
    n = backbone.sampler.frames_per_block
    found: list[MeasuredDecode] = []
    reference: list[Frames] = []
    scores: dict[str, float] = {}
    for variant in VARIANTS:
        if variant.fused_norm and (reason := norm_silu.unused(device)):
            found.append(MeasuredDecode(*variant, 0.0, reason))
            continue
        vae = load_vae(backbone.model_copy(update={"vae": backbone.vae.model_copy(update=variant._asdict())}), device)
        StreamingDecoder(vae).push(videos[0][: 2 * n])
        began = time.perf_counter()
        try:
            frames = [_decoded(vae, video, n) for video in videos]
        except OverflowError as error:
            found.append(MeasuredDecode(*variant, 0.0, str(error)))
            continue
        speed = sum(map(len, frames)) / (time.perf_counter() - began)
        own = _scores(frames, fps, networks) if networks is not None else {}
        if not reference:
            reference, scores = frames, own
        errors = np.concatenate([_square_errors(*pair) for pair in zip(frames, reference, strict=True)])
        found.append(
            MeasuredDecode(
                *variant,
                speed,
                psnr_db=_psnr(float(errors.mean())),
                psnr_worst_db=_psnr(float(errors.max())),
                vbench={name: score - scores[name] for name, score in own.items()} if networks is not None else None,
            )
        )
    return found


def _decoded(vae: WanVae, latents: Tensor, n: int) -> Frames:
    """Frames of a video, decoded block by block as beside a rollout."""
    decoder = StreamingDecoder(vae)
    return np.concatenate([decoder.push(block) for block in latents.split(n)])


def _square_errors(frames: Frames, reference: Frames) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Mean square error of each frame."""
    pairs = zip(frames, reference, strict=True)
    return np.array([np.square(a.astype(np.float32) - b).mean(dtype=np.float64) for a, b in pairs])


def _psnr(error: float) -> float | None:
    return 10 * math.log10(255**2 / error) if error else None


def _scores(videos: Sequence[Frames], fps: int, networks: Networks) -> dict[str, float]:
    """Mean over the clips of all videos, by dimension; those that a clip is too small for are left out."""
    scorer = ClipScorer("decoded", networks, fps)
    found: dict[str, list[float]] = {}
    for frames in videos:
        for clip in cut(frames, clip_length(fps)):
            for row in scorer.clip(clip.span, clip.frames, DIMENSION_NAMES):
                if row.score is not None:
                    found.setdefault(row.dimension, []).append(row.score)
    return {name: fmean(values) for name, values in found.items()}

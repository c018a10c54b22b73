"""What the official VBench-Long code does with clips, step by step, on our networks: the other side of `bench scoring`.

Once per video the splitter decodes it, holds it as float32, and re-encodes every clip. Then every dimension decodes
every clip again and feeds its network as VBench does: one frame or one pair of frames at a time and a wait for each
result, CLIP alone in batches; the last transformer block is computed for all tokens, RAFT's and MUSIQ's networks are
the packages' own. First frames of clips are encoded into one more file for each consistency dimension, decoded, and
compared one by one.

Left out, in favour of the official code: loading the networks again, the autograd graphs that it builds and throws away
in background_consistency and imaging_quality, its copies between numpy and torch, and the second file system pass.
The networks see the frames before re-encoding, so that the scores can be compared with ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lrag_ray.scoring.vbench_long import background_consistency, dynamic_degree, imaging_quality
from lrag_ray.scoring.vbench_long.clips import Clip, Frame
from lrag_ray.scoring.vbench_long.frames import decode
from lrag_ray.scoring.vbench_long.motion_smoothness import MULTIPLE
from lrag_ray.scoring.vbench_long.names import DimensionName
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.preprocess import (
    DINOV2_RESIZE,
    IMAGENET,
    SIDE,
    ClipFrames,
    centre_crop,
    normalise,
    pad_to_multiple,
    resize_shorter,
)
from lrag_ray.scoring.vbench_long.raft import ITERATIONS, STRIDE
from lrag_ray.scoring.vbench_long.reencode import encode
from lrag_ray.scoring.vbench_long.vit import VisionTransformer


def join(frames: Sequence[Frame], fps: int) -> None:
    """Write the file of the first frames of clips and decode it, as each consistency dimension does."""
    read(encode(frames, fps).getvalue())


def split(clips: Sequence[Clip], fps: int) -> list[bytes]:
    """The clip files of one decoded video."""
    whole = torch.cat([torch.stack([torch.from_numpy(frame) for frame in clip.frames]) for clip in clips]).float()
    files = [encode(clip.frames, fps).getvalue() for clip in clips]
    del whole
    return files


def score_clip(name: DimensionName, clip: Clip, fps: int, networks: Networks) -> float:
    """In-clip score."""
    return _run(networks, lambda: _IN_CLIP[name](ClipFrames(clip.frames, fps, networks.device), networks))


def score_first_frames(name: DimensionName, frames: Sequence[Frame], fps: int, networks: Networks) -> float:
    """Clip-to-clip score of a consistency dimension."""
    return _run(networks, lambda: _SLOW[name](ClipFrames(frames, fps, networks.device).uint8, networks))


def read(file: bytes) -> None:
    """Decode a clip file, as every dimension does."""
    import io

    torch.stack([torch.from_numpy(frame) for frame in decode(io.BytesIO(file))]).float()


def _run(networks: Networks, score: Callable[[], float]) -> float:
    with networks.numerics(), warnings.catch_warnings():
        # VBench's loops use calls that torch has deprecated.
        warnings.simplefilter("ignore")
        return score()


def _one_by_one(features: Iterable[Tensor]) -> float:
    """The consistency formula while the features come."""
    first = former = None
    values = []
    for feature in features:
        feature = F.normalize(feature, dim=1)
        if first is None or former is None:
            first = feature
        else:
            to_former = max(0.0, F.cosine_similarity(former, feature).item())
            values.append((to_former + max(0.0, F.cosine_similarity(first, feature).item())) / 2)
        former = feature
    return fmean(values)


def _all_tokens(network: Any, image: Tensor) -> Tensor:
    model: VisionTransformer = network
    return model.read_out(model.blocks(model.embed(image)))


def _subject(frames: ClipFrames, networks: Networks) -> float:
    images = resize_shorter(frames.uint8.float(), SIDE, "bilinear", antialias=False) / 255
    return _one_by_one(_all_tokens(networks.dino, normalise(image[None], IMAGENET)) for image in images)


def _clip_features(network: Any, frames: ClipFrames, networks: Networks, batch: int) -> Tensor:
    half = networks.precision == "official" and networks.device.type == "cuda"
    with torch.autocast(networks.device.type, torch.float16, enabled=half):
        return torch.cat([_all_tokens(network, part).float() for part in frames.clip_input.split(batch)])


def _background(frames: ClipFrames, networks: Networks) -> float:
    return _one_by_one(_clip_features(networks.clip_b32, frames, networks, len(frames)).split(1))


def _motion(frames: ClipFrames, networks: Networks) -> float:
    height, width = frames.uint8.shape[2:]
    padded, (top, left) = pad_to_multiple(frames.uint8[::2].float() / 255, MULTIPLE)
    halfway = padded.new_full((1, 1, 1, 1), 0.5)
    errors = []
    for index, (before, after) in enumerate(zip(padded[:-1].split(1), padded[1:].split(1), strict=True)):
        image = networks.amt.network(before, after, halfway, scale_factor=1.0, eval=True)["imgt_pred"].cpu()
        image = (image[0, :, top : top + height, left : left + width] * 255).clamp(0, 255).to(torch.uint8)
        errors.append((image.int() - frames.uint8[2 * index + 1].cpu().int()).abs().double().mean().item())
    return (255 - fmean(errors)) / 255


def _dynamic(frames: ClipFrames, networks: Networks) -> float:
    used = frames.uint8[:: dynamic_degree.sampling_interval(frames.fps)].float()
    padded, _ = pad_to_multiple(used, STRIDE)
    over = 0
    for before, after in zip(padded[:-1].split(1), padded[1:].split(1), strict=True):
        _, flow = networks.raft.network(before, after, iters=ITERATIONS, test_mode=True)
        fastest = flow.cpu().square().sum(1).sqrt().flatten().sort(descending=True).values
        radius = fastest[: int(len(fastest) * dynamic_degree.FASTEST)].mean().item()
        over += radius > dynamic_degree.threshold(*frames.uint8.shape[2:])
    return float(over >= dynamic_degree.pairs_needed(len(used)))


def _aesthetic(frames: ClipFrames, networks: Networks) -> float:
    features = _clip_features(networks.clip_l14, frames, networks, 32)
    return float((networks.aesthetic_head(F.normalize(features, dim=1)) / 10).mean())


def _imaging(frames: ClipFrames, networks: Networks) -> float:
    images = imaging_quality.shrink(frames.uint8.float())
    return fmean(float(networks.musiq.network(image[None])) for image in images)


def _slow_subject(frames: Tensor, networks: Networks) -> float:
    images = centre_crop(resize_shorter(frames.float(), DINOV2_RESIZE, "bicubic", antialias=True), SIDE) / 255
    return _one_by_one(_all_tokens(networks.dinov2, normalise(image[None], IMAGENET)) for image in images)


def _slow_background(frames: Tensor, networks: Networks) -> float:
    return _one_by_one(background_consistency.slow_features(frame[None], networks) for frame in frames)


_IN_CLIP: Mapping[DimensionName, Callable[[ClipFrames, Networks], float]] = {
    "subject_consistency": _subject,
    "background_consistency": _background,
    "motion_smoothness": _motion,
    "dynamic_degree": _dynamic,
    "aesthetic_quality": _aesthetic,
    "imaging_quality": _imaging,
}
_SLOW: Mapping[DimensionName, Callable[[Tensor, Networks], float]] = {
    "subject_consistency": _slow_subject,
    "background_consistency": _slow_background,
}

"""Speed of VBench-Long scoring: clips per second and dimension, share of decoding, and the official loops beside it.

Both sides use the same networks in the same precision on the same clips, so that the ratio is the flow's. Example::

    print(json.dumps(bench_scoring(["video.mp4"], Networks(RandomWeights(), "cuda"), official=True).as_dict()))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lrag_ray.bench import official_loops
from lrag_ray.errors import UsageError
from lrag_ray.scoring.vbench_long.clips import Clip, ClipSpan, clip_length, cut
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, DimensionName
from lrag_ray.scoring.vbench_long.networks import BatchSizes, Networks
from lrag_ray.scoring.vbench_long.prefetch import prefetch
from lrag_ray.scoring.vbench_long.rows import RowKey, ScoreRow
from lrag_ray.scoring.vbench_long.score import ClipScorer
from lrag_ray.video.mp4 import Mp4Writer

T = TypeVar("T")


@dataclass(frozen=True)
class Seconds:
    """Seconds by the clock on the wall and of all CPUs of this process, which a shared machine lengthens less."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        """Readings of both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


@dataclass
class Side:
    """One of the two sides."""

    seconds: dict[str, Seconds] = field(default_factory=dict)
    """Per dimension, clip to clip included. The official code decodes every clip again in each."""
    frames: Seconds = Seconds()
    """Until frames are there. Ours: waiting for the decoder that works ahead. Official: splitting, that is decoding the
    video and re-encoding every clip."""
    files: dict[str, Seconds] = field(default_factory=dict)
    """Official: what of `seconds` each dimension spends on files of clips and of their first frames. Ours has none."""

    def add(self, dimension: str, took: Seconds) -> None:
        """Count what one score of a dimension took."""
        self.seconds[dimension] = self.seconds.get(dimension, Seconds()) + took

    def networks(self, dimension: str) -> Seconds:
        """What of `seconds` is left without files."""
        return self.seconds[dimension] - self.files.get(dimension, Seconds())

    @property
    def total(self) -> Seconds:
        """Of the whole side."""
        return sum(self.seconds.values(), self.frames)


@dataclass(frozen=True)
class Ratio:
    """Official seconds over ours."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, official: Seconds, ours: Seconds) -> Ratio:
        """By both clocks."""
        return cls(official.wall / ours.wall, official.cpu / ours.cpu)


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
    videos: int
    clips: int
    frames_per_clip: int
    width: int
    height: int
    clips_per_s: dict[str, float]
    """Per dimension, by the wall."""
    clips_per_s_total: float
    """All dimensions together, waiting for frames included."""
    decode_share: float
    """What one decode of all videos alone takes over our total, by the wall. It runs beside the networks."""
    pairs_computed: int
    """Pairs of frames whose flow dynamic_degree computed."""
    ours: Side
    official: Side | None
    speedup: float | None
    """Official seconds over ours by the wall, all dimensions and the making of clips together."""
    speedup_cpu: float | None
    """The same in CPU seconds."""
    speedup_per_dimension: dict[str, Ratio]
    """The same by dimension, where the official code decodes every clip once more and ours does not."""
    speedup_of_networks: dict[str, Ratio]
    """The same by dimension without that: frames that are in memory, through the networks, to the score."""
    largest_difference: dict[str, float]
    """Between our scores and those of the official loops, by dimension."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sides = {name: _shown(side) for name, side in (("ours", self.ours), ("official", self.official))}
        return {**asdict(self), **sides}


def _shown(side: Side | None) -> dict[str, Any] | None:
    return {**asdict(side), "total": asdict(side.total)} if side else None


class _Video(NamedTuple):
    path: str | Path
    fps: int
    clips: list[Clip]
    decoding: Seconds


def bench_scoring(
    videos: Sequence[str | Path],
    networks: Networks,
    *,
    dimensions: Sequence[DimensionName] = DIMENSION_NAMES,
    official: bool = False,
    early_stop: bool = True,
) -> ScoringBench:
    """Score `videos` in mode direct after a warm-up, and with `official` the same clips as the official code does.

    Raises:
        UsageError: no video, or a dimension cannot score one of the clips.
        VideoError: a video cannot be read.
    """
    if not videos:
        raise UsageError("no video to score. Fix: --video FILE, or no option for a synthetic one")
    read = [_read(path) for path in videos]
    _warm_up(read[0], networks, dimensions)
    ours, rows = _ours(read, networks, dimensions, early_stop)
    theirs, difference = _official(read, networks, dimensions, rows) if official else (None, {})
    decoding = sum((video.decoding for video in read), Seconds())
    first = read[0].clips[0]
    clips = sum(len(video.clips) for video in read)
    height, width = first.frames[0].shape[:2]
    return ScoringBench(
        device=networks.device_kind,
        precision=networks.precision,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        batch=networks.batch,
        early_stop=early_stop,
        videos=len(read),
        clips=clips,
        frames_per_clip=first.span.frame_count,
        width=width,
        height=height,
        clips_per_s={name: clips / seconds.wall for name, seconds in ours.seconds.items()},
        clips_per_s_total=clips / ours.total.wall,
        decode_share=decoding.wall / ours.total.wall,
        pairs_computed=sum(len(row.per_frame) for row in rows.values() if row.dimension == "dynamic_degree"),
        ours=ours,
        official=theirs,
        speedup=theirs.total.wall / ours.total.wall if theirs else None,
        speedup_cpu=theirs.total.cpu / ours.total.cpu if theirs else None,
        speedup_per_dimension=_ratios(theirs, ours, lambda side, name: side.seconds[name]),
        speedup_of_networks=_ratios(theirs, ours, Side.networks),
        largest_difference=difference,
    )


def _ratios(official: Side | None, ours: Side, part: Callable[[Side, str], Seconds]) -> dict[str, Ratio]:
    return {name: Ratio.of(part(official, name), part(ours, name)) for name in ours.seconds} if official else {}


def make_clip(path: Path, *, fps: int = 16, width: int = 832, height: int = 480) -> None:
    """Write a moving texture of one clip, where no video is available."""
    side = 16
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // side + 1, width // side + 2 * fps, 3), dtype=np.uint8)
    texture = texture.repeat(side, axis=0).repeat(side, axis=1)
    with Mp4Writer(path, fps=fps) as writer:
        writer.write(np.stack([texture[:height, 3 * i : 3 * i + width] for i in range(2 * fps)]))


def _read(path: str | Path) -> _Video:
    rate = probe(path)
    start = Seconds.now()
    clips = list(cut(decode(path), clip_length(rate.fps)))
    return _Video(path, int(rate.fps), clips, Seconds.now() - start)


def _warm_up(video: _Video, networks: Networks, dimensions: Sequence[DimensionName]) -> None:
    """Build the networks; on a GPU also choose the kernels for frames of this size."""
    clip, scorer = video.clips[0], ClipScorer("warm-up", networks, video.fps, early_stop=False)
    few = clip.frames if networks.device.type == "cuda" else clip.frames[:4]
    list(scorer.clip(ClipSpan(0, len(few)), few, dimensions))
    list(scorer.clip_to_clip(2, clip.frames[:2], dimensions))


def _ours(
    videos: Sequence[_Video], networks: Networks, dimensions: Sequence[DimensionName], early_stop: bool
) -> tuple[Side, dict[RowKey, ScoreRow]]:
    side, rows = Side(), {}
    for video in videos:
        scorer = ClipScorer(str(video.path), networks, video.fps, early_stop=early_stop)
        firsts = []
        for clip, waited in _timed(prefetch(cut(decode(video.path), clip_length(video.fps))), networks):
            side.frames += waited
            firsts.append(clip.frames[0])
            for row, took in _timed(scorer.clip(clip.span, clip.frames, dimensions), networks):
                side.add(row.dimension, took)
                rows[row.key] = row
        if len(firsts) > 1:
            for row, took in _timed(scorer.clip_to_clip(len(firsts), firsts, dimensions), networks):
                side.add(row.dimension, took)
                rows[row.key] = row
    if unscored := [row for row in rows.values() if row.score is None]:
        raise UsageError(
            f"{unscored[0].video} has no {unscored[0].dimension}: {unscored[0].reason}. Fix: bench larger or longer "
            "videos, or leave the dimension out"
        )
    return side, rows


def _official(
    videos: Sequence[_Video], networks: Networks, dimensions: Sequence[DimensionName], rows: Mapping[RowKey, ScoreRow]
) -> tuple[Side, dict[str, float]]:
    side = Side()
    difference: dict[str, float] = dict.fromkeys(dimensions, 0.0)

    def score(name: DimensionName, key: RowKey, read: Callable[[], None], run: Callable[[], float]) -> None:
        _sync(networks)
        start = Seconds.now()
        read()
        side.files[name] = side.files.get(name, Seconds()) + (Seconds.now() - start)
        found = run()
        side.add(name, Seconds.now() - start)
        ours = rows[key].score
        assert ours is not None, "a clip without a score ends the bench before"
        difference[name] = max(difference[name], abs(found - ours))

    for video in videos:
        start = Seconds.now()
        files = official_loops.split(video.clips, video.fps)
        # The splitter decodes the video itself, which `_read` has timed.
        side.frames += Seconds.now() - start + video.decoding
        firsts = [clip.frames[0] for clip in video.clips]
        for name in dimensions:
            for clip, file in zip(video.clips, files, strict=True):
                key = RowKey(str(video.path), "clip", name, *clip.span)
                score(
                    name,
                    key,
                    partial(official_loops.read, file),
                    partial(official_loops.score_clip, name, clip, video.fps, networks),
                )
            key = RowKey(str(video.path), "clip_to_clip", name, 0, len(firsts))
            if key in rows:
                score(
                    name,
                    key,
                    partial(official_loops.join, firsts, video.fps),
                    partial(official_loops.score_first_frames, name, firsts, video.fps, networks),
                )
    return side, difference


def _timed(items: Iterator[T], networks: Networks) -> Iterator[tuple[T, Seconds]]:
    """Items, and what each took to come."""
    while True:
        start = Seconds.now()
        try:
            item = next(items)
        except StopIteration:
            return
        _sync(networks)
        yield item, Seconds.now() - start


def _sync(networks: Networks) -> None:
    if networks.device.type == "cuda":
        torch.cuda.synchronize(networks.device)

"""A run directory with real videos and real traces, made without Ray and without a generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from lrag_ray.context.trace import ALL_LAYERS, RowKind, TraceRow
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.video_rows import ScoreTarget, VideoRow, to_parquet
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import BackboneIdentity, Horizon, MethodIdentity, PromptIdentity, RunIdentity
from lrag_ray.store.parts import FinishedBlock, write_part
from lrag_ray.store.records import Commit, FileRecord, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import Mp4Writer

FRAMES_PER_BLOCK = 3
HORIZONS = (6, 12)
WINDOW, TOP_K = 6, 2


def make_identity(prompts: Sequence[str], methods: Sequence[str], horizons: Sequence[int] = HORIZONS) -> RunIdentity:
    """One tiny backbone; the prompts and methods given."""
    return RunIdentity(
        numerics_version=1,
        seed=7,
        samples=1,
        video={"fps": 16},
        backbones={
            "tiny": BackboneIdentity(
                latents={"weights": "w" * 64},
                pixels={"vae": "v" * 64},
                label="tiny, untrained",
                frames_per_block=FRAMES_PER_BLOCK,
                horizons=[Horizon(duration_s=frames / 4, latent_frames=frames) for frames in horizons],
            )
        },
        methods={name: MethodIdentity(method=name, settings={"window": WINDOW}, nested=True) for name in methods},
        prompts={f"{i:05d}-{_short(text)}": PromptIdentity(index=i, text=text) for i, text in enumerate(prompts)},
        created_at=now_utc(),
    )


def moving_frames(count: int, seed: int, speed: int) -> Frames:
    """Soft coloured texture that moves `speed` pixels per frame."""
    tiles = np.random.default_rng(seed).integers(40, 220, (16, 64, 3)).astype(np.float64)
    wide = tiles.repeat(8, axis=0).repeat(8, axis=1)
    for axis in (0, 1):
        wide = (np.roll(wide, 3, axis) + wide + np.roll(wide, -3, axis)) / 3
    frames = np.stack([np.roll(wide, -speed * t, axis=1)[:, :128] for t in range(count)])
    return frames.round().astype(np.uint8)


def trace_rows(block: int, *, retrieves: bool) -> list[TraceRow]:
    """What a block with a 6-frame window, one sink frame and two retrieved frames attends to."""
    first = block * FRAMES_PER_BLOCK

    def row(kind: RowKind, frame: int, similarity: float | None = None) -> TraceRow:
        return TraceRow(block, ALL_LAYERS, kind, frame, frame, 6, similarity)

    rows = [row("sink", 0)] if block else []
    local = range(max(1, first - FRAMES_PER_BLOCK), first)
    if retrieves:
        history = range(1, max(1, local.start))
        rows += [row("retrieved", frame, 0.9 - 0.05 * i) for i, frame in enumerate(history[:TOP_K])]
    rows += [row("local", frame) for frame in local]
    return rows + [row("current", first + i) for i in range(FRAMES_PER_BLOCK)]


def store_rollout(run: RolloutRun, identity: RunIdentity, rollout: RolloutId, horizons: Sequence[int]) -> None:
    """Latent parts, traces, videos and commits of one rollout up to `horizons`."""
    folder = f"{rollout.path}/attempt-one"
    seed = identity.prompts[rollout.prompt_id].index
    key = identity.rollout_key(rollout, horizons[-1])
    parts, start = [], 0
    for horizon in horizons:
        blocks = [
            FinishedBlock(
                block, torch.zeros(FRAMES_PER_BLOCK, 1, 2, 2), trace_rows(block, retrieves=rollout.method == "rag"), {}
            )
            for block in range(start // FRAMES_PER_BLOCK, horizon // FRAMES_PER_BLOCK)
        ]
        parts.append(write_part(run.storage, folder, blocks, rollout_key=key, device_kind="cpu"))
        start = horizon
        frames = moving_frames(1 + 4 * (horizon - 1), seed, speed=1 + len(rollout.method) % 3)
        commit = Commit(
            rollout=rollout,
            rollout_key=key,
            latent_frames=horizon,
            attempt="one",
            latent_parts=[part.latents for part in parts],
            trace_parts=[part.trace for part in parts],
            video=store_video(run, f"{folder}/video-{horizon}.mp4", frames),
            video_frames=len(frames),
            fps=16,
            latents_digest="d" * 64,
            device_kind="cpu",
            versions={"torch": "2.12.1"},
            timings_s={"denoise": 1.0},
            created_at=now_utc(),
        )
        assert run.commit(commit)


_MP4S: dict[tuple[tuple[int, ...], str], bytes] = {}
"""Files that were encoded in this process, by shape and digest of the frames: most tests film the same few."""


def store_video(run: RolloutRun, path: str, frames: Frames) -> FileRecord:
    """Encode and store one video."""
    key = (frames.shape, hashlib.sha256(frames.tobytes()).hexdigest())
    with TemporaryDirectory() as scratch:
        local = Path(scratch) / "video.mp4"
        if key not in _MP4S:
            with Mp4Writer(local) as writer:
                writer.write(frames)
            _MP4S[key] = local.read_bytes()
        content = _MP4S[key]
        local.write_bytes(content)
        run.storage.put_file(local, path)
    return FileRecord(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def make_run(
    uri: str, prompts: Sequence[str], methods: Sequence[str] = ("base", "rag"), horizons: Sequence[int] = HORIZONS
) -> RolloutRun:
    """A run with every cell committed."""
    run = RolloutRun(uri)
    identity = run.ensure(make_identity(prompts, methods, horizons))
    for prompt_id in identity.prompts:
        for method in methods:
            store_rollout(run, identity, RolloutId(backbone="tiny", method=method, prompt_id=prompt_id), horizons)
    return run


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def preview_row(storage: Storage, target: ScoreTarget) -> VideoRow:
    """The preview scores of one video."""
    return PREVIEW.worker(storage, storage, threads=1, device="cpu").row(target)


_ROWS: dict[tuple[str, int, int], VideoRow] = {}
"""Scores that were computed in this process, by content and frames of the video."""


def score_all(run: RolloutRun) -> RolloutRun:
    """Store the preview scores of every video of `run`, each computed once per process."""
    for target in PREVIEW.pending_targets(run):
        key = (target.video_sha256, target.video_frames, target.frames_per_block)
        if key not in _ROWS:
            _ROWS[key] = preview_row(run.storage, target)
        path = target.score_path(PREVIEW)
        run.storage.create(path, to_parquet([replace(_ROWS[key], target=target)], PREVIEW, path))
    return run

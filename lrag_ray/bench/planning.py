"""CPU seconds that status, inventory and planning take on a large run: a made-up run directory with empty files.

``python -m lrag_ray.bench.planning --rollouts 25000`` prints one JSON object. With the default of 25,000 rollouts and
four horizons that is 100,000 cells per prompt and 500,000 files, of which nine tenths are committed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrag_ray.config.prompts import make_prompt
from lrag_ray.stages.rollout.pending import pending_rollouts
from lrag_ray.store.gc import find_leftovers
from lrag_ray.store.identity import BackboneIdentity, Horizon, MethodIdentity, PromptIdentity, RunIdentity
from lrag_ray.store.records import Commit, FileRecord, LatentPart, PartRecord, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from lrag_ray.store.videos import committed_videos

HORIZONS = (120, 240, 360, 480)
"""Latent frames; one part ends at each."""
METHODS = 4
BACKBONES = 2
DONE = 0.9
"""Share of the rollouts whose every horizon is committed; half of the others have their first part."""
_PART_BYTES = 11_980_800


def bench_planning(rollouts: int, folder: Path) -> dict[str, Any]:
    """Make a run of `rollouts` rollouts in the empty `folder`, and time what reads it."""
    identity = make_large_run(folder, rollouts)
    run = RolloutRun(str(folder))
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        # Of the CPU, because the disk's part is small and a shared machine lengthens the others.
        began = time.process_time()
        found = call()
        seconds[name] = round(time.process_time() - began, 2)
        return found

    inventory = timed("inventory", run.inventory)
    work = timed("pending_rollouts", lambda: pending_rollouts(identity, inventory, lambda *_: 0))
    timed("refuse_foreign_commits", lambda: run.refuse_foreign_commits(identity, inventory))
    status = timed("run_status", lambda: run_status(run))
    videos = timed("committed_videos", lambda: sum(1 for _ in committed_videos(run)))
    leftovers = timed("gc", lambda: find_leftovers(run, older_than_s=0, unfinished=True))
    return {
        "rollouts": sum(cell.total for cell in status.cells) // len(HORIZONS),
        "cells": sum(cell.total for cell in status.cells),
        "done": sum(cell.done for cell in status.cells),
        "partial": sum(cell.partial for cell in status.cells),
        "files": len(inventory.files),
        "open_rollouts": len(work.tasks),
        "videos": videos,
        "leftovers": len(leftovers.found),
        "cpu_seconds": seconds,
    }


def make_large_run(folder: Path, rollouts: int) -> RunIdentity:
    """``run.json``, commits and the files that they name; the latter have sizes and no content."""
    prompts = [
        make_prompt(index, f"prompt {index} of many, of the length that prompts have in benchmarks " * 8)
        for index in range(rollouts // (METHODS * BACKBONES))
    ]
    run = RolloutRun(str(folder))
    identity = run.ensure(
        RunIdentity(
            numerics_version=1,
            seed=0,
            samples=1,
            video={"enabled": True, "fps": 16, "crf": 18, "cold_chunk": None},
            backbones={
                f"backbone-{number}": BackboneIdentity(
                    latents={"weights": {"sha256": "0" * 64}, "text_encoder": {"sha256": "1" * 64}, "sizes": [1] * 20},
                    pixels={"vae": {"sha256": "2" * 64}},
                    label="",
                    frames_per_block=3,
                    horizons=[Horizon(duration_s=frames / 4, latent_frames=frames) for frames in HORIZONS],
                )
                for number in range(BACKBONES)
            },
            methods={
                f"method-{number}": MethodIdentity(method="base", settings={"window": number}, nested=True)
                for number in range(METHODS)
            },
            prompts={prompt.prompt_id: PromptIdentity(index=prompt.index, text=prompt.text) for prompt in prompts},
            created_at=now_utc(),
        )
    )
    number = 0
    for prompt in prompts:
        for backbone in identity.backbones:
            for method in identity.methods:
                rollout = RolloutId(backbone=backbone, method=method, prompt_id=prompt.prompt_id, sample=0)
                share = number * 0.618 % 1
                horizons = 4 if share < DONE else 1 if share < (1 + DONE) / 2 else 0
                _make_rollout(folder, identity, rollout, horizons, committed=share < DONE)
                number += 1
    return identity


def _make_rollout(folder: Path, identity: RunIdentity, rollout: RolloutId, horizons: int, *, committed: bool) -> None:
    attempt = f"{rollout.path}/attempt-20260101T000000-00000000"
    key = identity.rollout_key(rollout, HORIZONS[-1])
    if horizons:
        (folder / attempt).mkdir(parents=True)
    parts: list[PartRecord] = []
    for first, end in zip((0, *HORIZONS), HORIZONS[:horizons], strict=False):
        name = f"{attempt}/part-{first:05d}-{end:05d}"
        latents, trace = f"{name}.safetensors", f"{name}.trace.parquet"
        part = PartRecord(
            rollout_key=key,
            attempt=attempt.rsplit("-", 1)[-1],
            latents=LatentPart(
                path=latents, size_bytes=_PART_BYTES, sha256="3" * 64, first_frame=first, frames=end - first
            ),
            trace=FileRecord(path=trace, size_bytes=90_000, sha256="4" * 64),
            device_kind="cpu",
        )
        parts.append(part)
        _sized(folder / latents, _PART_BYTES)
        _sized(folder / trace, 90_000)
        (folder / f"{name}.json").write_text(part.model_dump_json(indent=1))
        if committed:
            video = f"{attempt}/video-{end}.mp4"
            _sized(folder / video, 5_000_000)
            commit = Commit(
                rollout=rollout,
                rollout_key=key,
                latent_frames=end,
                attempt=part.attempt,
                latent_parts=[part.latents for part in parts],
                trace_parts=[part.trace for part in parts],
                video=FileRecord(path=video, size_bytes=5_000_000, sha256="5" * 64),
                video_frames=4 * end - 3,
                fps=16,
                latents_digest="6" * 64,
                device_kind="cpu",
                versions={"torch": "2.12"},
                timings_s={"denoise": 1.0},
                created_at=now_utc(),
            )
            (folder / rollout.path / f"commit-{end}.json").write_text(commit.model_dump_json(indent=1))


def _sized(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=25_000)
    parser.add_argument("--folder", type=Path, default=None, help="an empty folder; a temporary one otherwise")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrag-") as temporary:
        print(json.dumps(bench_planning(arguments.rollouts, arguments.folder or Path(temporary))))


if __name__ == "__main__":
    main()

"""The committed videos of a run, one per cell and prompt: what is scored and what a report shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from lrag_ray.store.decoded import DecodedVideos, read_decoded
from lrag_ray.store.records import Commit, FileRecord, RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.wan.vae import video_frames


@dataclass(frozen=True)
class CommittedVideo:
    """A rollout's video at one duration."""

    rollout: RolloutId
    latent_frames: int
    """The duration."""
    duration_s: float
    """The duration as the configuration names it."""
    video: FileRecord
    """The file; longer than the duration where only a longer horizon was committed."""
    frames: int
    """Video frames from its start that belong to the duration."""
    fps: int
    """Frames per second of the file."""
    frames_per_block: int
    """Latent frames of a block."""
    cold_chunk: int | None
    """Latent frames of the chunks that were decoded like new videos, if they were."""
    commit: Commit
    """The shortest commit that covers the duration."""


def committed_videos(run_dir: RolloutRun) -> Iterator[CommittedVideo]:
    """Every cell and prompt of the run that has a video, in prompt-major order.

    A duration that was added later may be covered by a longer commit only; its video is then the start of the longer
    one, which is what nested durations mean. A commit without a video has the one that was decoded later, if any.
    Raises StorageError where there is no run, IdentityError where its record is another's.
    """
    identity = run_dir.require()
    inventory = run_dir.own_inventory(identity)
    decoded = DecodedVideos({}, {}) if identity.video.get("enabled", True) else read_decoded(run_dir)
    settings = {name: decoded.preferred_settings(identity, name) for name in identity.backbones}
    for rollout in identity.rollouts_at(inventory.commits):
        seconds = {
            horizon.latent_frames: horizon.duration_s for horizon in identity.backbones[rollout.backbone].horizons
        }
        for latent_frames, key in identity.rollout_keys(rollout).items():
            commit = inventory.covering(rollout, latent_frames, key)
            if commit is None:
                continue
            made = settings[rollout.backbone]
            video, whole_frames, fps = commit.video, commit.video_frames, commit.fps
            if video is None:
                again = decoded.of(commit, made)
                if again is None:
                    continue
                video, whole_frames, fps = again.video, again.frames, again.fps
            whole = commit.latent_frames == latent_frames
            cold_chunk = _cold_chunk(made)
            frames = whole_frames if whole else video_frames(latent_frames, cold_chunk)
            yield CommittedVideo(
                rollout=rollout,
                latent_frames=latent_frames,
                duration_s=seconds[latent_frames],
                video=video,
                frames=frames,
                fps=fps,
                frames_per_block=identity.backbones[rollout.backbone].frames_per_block,
                cold_chunk=cold_chunk,
                commit=commit,
            )


def _cold_chunk(settings: Mapping[str, JsonValue]) -> int | None:
    """A stranger's run may hold anything."""
    found = settings.get("cold_chunk")
    return found if isinstance(found, int) and found > 0 else None

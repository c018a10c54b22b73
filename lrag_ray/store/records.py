"""The records that a run directory holds, as plain data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of everything written to run storage: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RolloutId(Record):
    """Which rollout: the unit of work of the engine."""

    backbone: str
    method: str
    prompt_id: str
    """Line index and short hash of the text, e.g. ``00003-1f2e3d4c``."""
    sample: int = 0

    @property
    def path(self) -> str:
        """Folder below the run: ``rollouts/<backbone>/<method>/<prompt_id>-<sample>``."""
        return f"rollouts/{self.backbone}/{self.method}/{self.prompt_id}-{self.sample}"


class FileRecord(Record):
    """A file that counts, relative to the run's address."""

    path: str
    """Relative to the run's address, e.g. ``rollouts/tiny/base/00000-ab12cd34-0/attempt-x/video-36.mp4``."""
    size_bytes: int
    sha256: str


class LatentPart(FileRecord):
    """A safetensors file of consecutive latent frames: tensor ``latents`` [frames, C, H, W]."""

    first_frame: int
    frames: int


class Commit(Record):
    """``commit-<latent_frames>.json``: one reached horizon of one rollout, created once."""

    rollout: RolloutId
    rollout_key: str
    latent_frames: int
    """The horizon."""
    attempt: str
    latent_parts: list[LatentPart]
    """In order, covering frames 0 .. latent_frames-1, of whichever attempt."""
    trace_parts: list[FileRecord]
    """Parquet parts of the trace, in order (columns: the fields of `rollout.types.TraceRow`)."""
    video: FileRecord | None
    """The horizon's H.264 file, or None where videos are off."""
    video_frames: int
    fps: int
    latents_digest: str
    """SHA-256 over the latent values in frame order."""
    device_kind: str
    """``cpu`` or the name of the GPU."""
    versions: dict[str, str]
    timings_s: dict[str, float]
    """Seconds spent per stage up to this horizon (load, denoise, context, decode, store)."""
    created_at: str
    """UTC, ISO 8601."""

"""The records that a run directory holds, as plain data."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lrag_ray.store.seal import check_placed, parsed_json, sealed_json

HOW_TO_REPAIR = (
    "Fix: `lrag-ray run CONFIG --repair`, with the configuration of the run, makes again what is damaged; "
    "`lrag-ray verify --run RUN --bytes` lists it"
)
"""What readers say of a stored file that is not what was written."""


def now_utc() -> str:
    """The time as records write it: UTC, ISO 8601, whole milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_attempt_id() -> str:
    """A name that no other attempt has; sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


def _a_time(text: str) -> str:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None or not 1970 <= time.year < 3000:
        raise ValueError("a time without its zone, or far from ours")
    return text


def _json_value(value: Any) -> Any:
    """What JSON of ours can hold and digests are made of: finite numbers of 64 bits, whole characters."""
    match value:
        case dict():
            for key, item in value.items():
                _json_value(key)
                _json_value(item)
        case list():
            for item in value:
                _json_value(item)
        case bool() | None | str():
            pass
        case int() if -(2**63) <= value < 2**64:
            pass
        case float() if math.isfinite(value):
            pass
        case _:
            raise ValueError("a number beyond 64 bits, or not finite")
    return value


JsonValue = Annotated[Any, AfterValidator(_json_value)]
"""None, bool, int, float, str, and lists and dicts of them."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""Of bytes, frames, samples."""


UtcTime = Annotated[str, AfterValidator(_a_time)]
"""What `now_utc` gives; a damaged one is refused with its record, before anybody sorts by it."""


_ROLLOUT_FOLDER = re.compile(r"^rollouts/([^/]+)/([^/]+)/([^/]+)-(0|[1-9]\d{0,17})$", re.ASCII | re.DOTALL)

ROLLOUTS = "rollouts"
"""Stage whose tasks are rollouts, and their folder below the run."""


class Record(BaseModel):
    """Base of everything written to run storage: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def sealed(self) -> bytes:
        """The record as a file: JSON with a seal (see `lrag_ray.store.seal`)."""
        return sealed_json(self.model_dump_json(indent=1))

    @classmethod
    def opened(cls, data: bytes) -> Self:
        """The record in a file. ValueError, which `why_not` puts in words, where it is none or is damaged."""
        return cls.model_validate(parsed_json(data))


class PlacedRecord(Record):
    """A record that says where it is stored, so that a file in another one's place is noticed."""

    path: str
    """Below the run."""

    @classmethod
    def opened_at(cls, path: str, data: bytes) -> Self:
        """The record in the file at `path`; ValueError where it is damaged or another one's."""
        check_placed(data, path)
        return cls.opened(data)


def why_not(error: ValueError) -> str:
    """Why `Record.opened` refused a file, in a few words."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{first['msg']} at {'.'.join(map(str, first['loc'])) or 'its start'}"


class RolloutId(Record):
    """Which rollout: the unit of work of the engine."""

    backbone: str
    method: str
    prompt_id: str
    """Line index and short hash of the text, e.g. ``00003-1f2e3d4c``."""
    sample: Count = 0

    @property
    def path(self) -> str:
        """Folder below the run: ``rollouts/<backbone>/<method>/<prompt_id>-<sample>``."""
        return f"rollouts/{self.backbone}/{self.method}/{self.prompt_id}-{self.sample}"

    @classmethod
    def at(cls, folder: str) -> RolloutId | None:
        """The rollout whose `path` is `folder`; None where that is not the folder of a rollout."""
        match = _ROLLOUT_FOLDER.match(folder)
        return match and cls(backbone=match[1], method=match[2], prompt_id=match[3], sample=int(match[4]))


class FileRecord(Record):
    """A file that counts, relative to the run's address."""

    path: str
    """Relative to the run's address, e.g. ``rollouts/tiny/base/00000-ab12cd34-0/attempt-x/video-36.mp4``."""
    size_bytes: Count
    sha256: str


class LatentPart(FileRecord):
    """A safetensors file of consecutive latent frames: tensor ``latents`` [frames, C, H, W]."""

    first_frame: Count
    frames: Count


class Commit(Record):
    """``commit-<latent_frames>.json``: one reached horizon of one rollout, created once."""

    rollout: RolloutId
    rollout_key: str
    latent_frames: Count
    """The horizon."""
    attempt: str
    latent_parts: list[LatentPart]
    """In order, covering frames 0 .. latent_frames-1, of whichever attempt."""
    trace_parts: list[FileRecord]
    """Parquet parts of the trace, in order (columns: the fields of `context.trace.TraceRow`)."""
    video: FileRecord | None
    """The horizon's H.264 file, or None where videos are off."""
    video_frames: Count
    fps: int = Field(ge=1, le=1000)
    latents_digest: str
    """SHA-256 over the latent values in frame order."""
    device_kind: str
    """``cpu``, or the GPU with the versions of torch and cuDNN."""
    versions: dict[str, str]
    timings_s: dict[str, float]
    """Seconds spent per stage up to this horizon (load, replay, denoise, context, decode, store)."""
    created_at: UtcTime

    @property
    def files(self) -> list[FileRecord]:
        """All files that it names."""
        return [*self.latent_parts, *self.trace_parts, *([self.video] if self.video else [])]


class DecodedVideo(Record):
    """``decoded/…/video-<latent_frames>.json``: a video made again from a commit's latents, created once."""

    rollout: RolloutId
    latent_frames: Count
    """The horizon."""
    latents_digest: str
    """Of the commit whose latents were decoded."""
    video: FileRecord
    frames: Count
    fps: int = Field(ge=1, le=1000)
    settings: dict[str, JsonValue]
    """What determines the pixels besides the latents: VAE by digest, fps, crf, cold_chunk."""
    device_kind: str
    """``cpu``, or the GPU with the versions of torch and cuDNN."""
    created_at: UtcTime


class FileIndex(Record):
    """``summary/files.json``: what a report consists of."""

    files: list[FileRecord]


class PartRecord(Record):
    """``attempt-<id>/part-<first>-<end>.json``: written after its two files, so a part without it does not exist.

    Parts are the checkpoints of a rollout: a later attempt continues from any unbroken chain of them.
    """

    rollout_key: str
    attempt: str
    latents: LatentPart
    trace: FileRecord
    device_kind: str

    @property
    def first_frame(self) -> int:
        """First latent frame."""
        return self.latents.first_frame

    @property
    def end_frame(self) -> int:
        """One past the last latent frame."""
        return self.latents.first_frame + self.latents.frames


FailureKind = Literal["exception", "death", "out_of_memory", "refused"]


class FailureRecord(Record):
    """``failures/…/<attempt>.json``: why an attempt at a task of any stage failed."""

    stage: str = ROLLOUTS
    """Stage of the task: text, rollouts, decode, scoring, …"""
    task: str
    """Title of the task; for a rollout its folder."""
    attempt: str
    kind: FailureKind
    """exception: the task itself raised. death, out_of_memory: its worker or node went away. refused: it can never be
    done, for instance because its input is damaged."""
    counted: bool
    """Whether the attempt counts against `engine.max_attempts`."""
    counted_attempts: Count
    """Counted attempts so far, this one included."""
    quarantined: bool
    """The task was quarantined after this attempt; the next start of the run retries it."""
    reason: str
    """One line."""
    traceback: str
    created_at: UtcTime

    @model_validator(mode="before")
    @classmethod
    def _written_before_stages(cls, data: Any) -> Any:
        # Runs of earlier versions: only rollouts had failure records.
        if isinstance(data, dict) and "task" not in data and "rollout" in data:
            data = {key: value for key, value in data.items() if key != "rollout_key"}
            data["task"] = RolloutId.model_validate(data.pop("rollout")).path
        return data

    @property
    def path(self) -> str:
        """Where the record is stored below the run."""
        return f"{failure_folder(self.stage, self.task)}/{self.attempt}.json"


def failure_folder(stage: str, task: str) -> str:
    """Folder of a task's failure records.

    For a rollout ``failures/<backbone>/<method>/<prompt_id>-<sample>``, otherwise ``failures/@<stage>/<digest of the
    title>``: no backbone has a name that begins with @.
    """
    if stage == ROLLOUTS:
        return f"failures/{task.removeprefix('rollouts/')}"
    return f"failures/@{stage}/{hashlib.sha256(task.encode()).hexdigest()[:20]}"

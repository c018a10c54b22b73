"""Videos decoded again from a run's stored latents, beside the run's own: commits never change.

::

    RUN/decoded/<settings digest>/<backbone>/<method>/<prompt_id>-<sample>/
        attempt-<id>/video-<latent_frames>.mp4
        video-<latent_frames>.json     `DecodedVideo`, created once; names the video that counts

A decoded video counts if its record can be read, is where it says it belongs, its file has the recorded size and
its latents are those of the commit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lrag_ray.store.identity import RunIdentity, canonical_digest
from lrag_ray.store.records import Commit, DecodedVideo, JsonValue, RolloutId, why_not
from lrag_ray.store.rollouts import RolloutRun

FOLDER = "decoded"
RECORD = re.compile(rf"^({FOLDER}/[^/]+/[^/]+/[^/]+/[^/]+)/video-(\d+)\.json$")
_DIGEST_CHARACTERS = 12


def decode_settings(pixels: Mapping[str, JsonValue], video: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """What determines a video, given latents: `pixels` of a backbone and the video section without its switch."""
    return {**pixels, **{key: value for key, value in video.items() if key != "enabled"}}


def own_settings(identity: RunIdentity, backbone: str) -> dict[str, JsonValue]:
    """Settings of the videos that the run itself makes."""
    return decode_settings(identity.backbones[backbone].pixels, identity.video)


def settings_folder(settings: Mapping[str, JsonValue]) -> str:
    """Where all videos with these settings are."""
    return f"{FOLDER}/{canonical_digest(settings)[:_DIGEST_CHARACTERS]}"


def decoded_folder(settings: Mapping[str, JsonValue], rollout: RolloutId) -> str:
    """Where the videos of a rollout are for these settings."""
    return f"{settings_folder(settings)}/{rollout.path.removeprefix('rollouts/')}"


@dataclass(frozen=True)
class DecodedVideos:
    """What one listing of the decoded videos showed."""

    records: Mapping[str, DecodedVideo]
    """Records whose video has the recorded size, by path."""
    problems: Mapping[str, str]
    """Why a record does not count, by path."""

    def of(self, commit: Commit, settings: Mapping[str, JsonValue]) -> DecodedVideo | None:
        """The video of a commit with these settings, or None."""
        found = self.records.get(record_path(settings, commit.rollout, commit.latent_frames))
        return found if found is not None and found.latents_digest == commit.latents_digest else None

    def preferred_settings(self, identity: RunIdentity, backbone: str) -> Mapping[str, JsonValue]:
        """Settings whose videos stand for a run without videos: never two kinds of one backbone in one table.

        Those of the run itself where there are any, else those with most videos, else the older ones.
        """
        found: dict[str, list[DecodedVideo]] = {}
        for record in self.records.values():
            if record.rollout.backbone == backbone:
                found.setdefault(canonical_digest(record.settings), []).append(record)
        own = own_settings(identity, backbone)
        if not found or canonical_digest(own) in found:
            return own
        chosen = min(found.values(), key=lambda group: (-len(group), min(record.created_at for record in group)))
        return chosen[0].settings


def record_path(settings: Mapping[str, JsonValue], rollout: RolloutId, latent_frames: int) -> str:
    """Where the record of a decoded video is."""
    return f"{decoded_folder(settings, rollout)}/video-{latent_frames}.json"


def read_decoded(run: RolloutRun) -> DecodedVideos:
    """List the decoded videos of a run and read their records."""
    files = run.storage.list_files(FOLDER)
    records, problems = {}, {}
    for path, data in run.storage.read_many([path for path in files if RECORD.match(path)]).items():
        try:
            record = DecodedVideo.opened(data)
        except ValueError as error:
            problems[path] = f"not a record of a decoded video: {why_not(error)}"
            continue
        folder = decoded_folder(record.settings, record.rollout)
        named = record.video.path
        if named not in files and named.startswith(f"{folder}/attempt-"):
            # A listing may lag behind.
            files |= run.storage.sizes([named])
        size = files.get(named)
        if path != record_path(record.settings, record.rollout, record.latent_frames):
            problems[path] = f"belongs to {folder}, {record.latent_frames} latent frames"
        elif not record.video.path.startswith(f"{folder}/attempt-"):
            problems[path] = f"names {record.video.path}, a file of another rollout"
        elif size is None:
            problems[path] = f"names {record.video.path}, which is missing"
        elif size != record.video.size_bytes:
            problems[path] = f"names {record.video.path}, which has {size} bytes instead of {record.video.size_bytes}"
        else:
            records[path] = record
    return DecodedVideos(records, problems)

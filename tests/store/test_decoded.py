from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.store.decoded import decode_settings, decoded_folder, own_settings, read_decoded, record_path
from lrag_ray.store.records import Commit, DecodedVideo, FileRecord
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import committed_videos
from tests.store.make import make_identity, rollout_id, store_commit

IDENTITY = make_identity(video={"enabled": False, "fps": 16, "crf": 18, "cold_chunk": None})
OWN = own_settings(IDENTITY, "tiny")
OTHER = decode_settings({"vae": "v0"}, {"fps": 16, "crf": 30, "cold_chunk": None})


def store_decoded(run: RolloutRun, commit: Commit, settings: dict[str, object], day: int = 1) -> str:
    folder = f"{decoded_folder(settings, commit.rollout)}/attempt-one"
    video = FileRecord(path=f"{folder}/video-{commit.latent_frames}.mp4", size_bytes=3, sha256="s")
    run.storage.write(video.path, b"mp4")
    record = DecodedVideo(
        rollout=commit.rollout,
        latent_frames=commit.latent_frames,
        latents_digest=commit.latents_digest,
        video=video,
        frames=commit.video_frames,
        fps=16,
        settings=settings,
        device_kind="cpu",
        created_at=f"2026-11-{day:02}T00:00:00.000+00:00",
    )
    path = record_path(settings, commit.rollout, commit.latent_frames)
    assert run.storage.create(path, record.model_dump_json().encode())
    return path


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    """Two rollouts, each committed at one horizon and without a video."""
    made = RolloutRun(str(tmp_path))
    made.ensure(IDENTITY)
    return made


@pytest.fixture
def commits(run: RolloutRun) -> list[Commit]:
    found = []
    for prompt_id in IDENTITY.prompts:
        commit = store_commit(run, IDENTITY, rollout_id(prompt_id), 6).model_copy(update={"video": None})
        run.storage.write(f"{commit.rollout.path}/commit-6.json", commit.model_dump_json().encode())
        found.append(commit)
    return found


def shown_folders(run: RolloutRun) -> list[str]:
    return ["/".join(video.video.path.split("/")[:2]) for video in committed_videos(run)]


def folder(settings: dict[str, object]) -> str:
    return decoded_folder(settings, rollout_id()).removesuffix("/tiny/base/00000-aa-0")


def test_videos_of_two_settings_are_never_shown_together(run: RolloutRun, commits: list[Commit]) -> None:
    assert shown_folders(run) == []
    older = decode_settings({"vae": "v1"}, {"fps": 16, "crf": 18})
    store_decoded(run, commits[0], OTHER, 2)
    store_decoded(run, commits[1], older, 1)
    assert shown_folders(run) == [folder(older)]
    store_decoded(run, commits[1], OTHER, 3)
    assert shown_folders(run) == [folder(OTHER)] * 2
    store_decoded(run, commits[0], OWN, 4)
    assert shown_folders(run) == [folder(OWN)]


def test_a_decoded_video_counts_only_with_its_file_and_its_commits_latents(
    run: RolloutRun, commits: list[Commit]
) -> None:
    first, second = (store_decoded(run, commit, OWN) for commit in commits)
    assert shown_folders(run) == [folder(OWN)] * 2
    run.storage.write(first.replace("/video-6.json", "/attempt-one/video-6.mp4"), b"longer")
    assert read_decoded(run).problems[first].endswith("which has 6 bytes instead of 3")
    assert read_decoded(run).of(commits[1].model_copy(update={"latents_digest": "other"}), OWN) is None
    run.storage.move(second, first.replace("video-6", "video-12"))
    assert "belongs to" in read_decoded(run).problems[first.replace("video-6", "video-12")]
    run.storage.write(second, b"{}")
    assert read_decoded(run).problems[second].startswith("not a record of a decoded video")
    assert shown_folders(run) == []

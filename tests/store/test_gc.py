"""What `lrag-ray gc` finds, and above all what it does not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lrag_ray.errors import LeaseError, StorageError
from lrag_ray.events import Event, Notice
from lrag_ray.pipelines.gc import collect_garbage
from lrag_ray.store.gc import BESIDE_S, find_leftovers
from lrag_ray.store.lease import Lease, new_record, take_lease
from lrag_ray.store.parts import write_part
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.store.make import FRAMES_PER_BLOCK, make_blocks, make_identity, rollout_id, store_commit, store_part
from tests.store.test_decoded import store_decoded

FINISHED, OPEN = rollout_id("00000-aa"), rollout_id("00001-bb")


@pytest.fixture
def run(run_uri: str) -> RolloutRun:
    """One rollout whose both horizons are committed, one that has parts, and leftovers of all kinds."""
    run = RolloutRun(run_uri)
    identity = run.ensure(make_identity())
    storage = run.storage
    for horizon in (6, 12):
        store_commit(run, identity, FINISHED, horizon)
    store_part(run, 0, 2, key="k", attempt="died")  # of FINISHED
    storage.write(f"{FINISHED.path}/attempt-died/video-6.mp4", b"died before its commit")
    storage.write(f"{FINISHED.path}/commit-6.json.invalid-0a1b2c3d", b"{}")
    storage.write("probe-0123", b"probe")
    store_commit(run, identity, OPEN, 6)
    write_open_part(run)
    storage.write(f"{OPEN.path}/attempt-two/part-00012-00015.safetensors", b"its record was never written")
    storage.write(f"{OPEN.path}/attempt-two/video-12.mp4", b"nobody continues from a video")
    storage.write("rollouts/strangers/own/folder/attempt-x/file", b"not ours to judge")
    return run


def write_open_part(run: RolloutRun) -> None:
    folder = f"{OPEN.path}/attempt-two"
    write_part(run.storage, folder, make_blocks(6 // FRAMES_PER_BLOCK, 1), rollout_key="k", device_kind="cpu")


LEFTOVERS = {
    f"{FINISHED.path}/attempt-died/part-00000-00006.json": "unnamed part",
    f"{FINISHED.path}/attempt-died/part-00000-00006.safetensors": "unnamed part",
    f"{FINISHED.path}/attempt-died/part-00000-00006.trace.parquet": "unnamed part",
    f"{FINISHED.path}/attempt-died/video-6.mp4": "unnamed video",
    f"{FINISHED.path}/commit-6.json.invalid-0a1b2c3d": "set aside",
    "probe-0123": "probe",
    f"{OPEN.path}/attempt-two/part-00012-00015.safetensors": "unnamed part",
    f"{OPEN.path}/attempt-two/video-12.mp4": "unnamed video",
}
OPEN_PARTS = {
    f"{OPEN.path}/attempt-two/part-00006-00009.{suffix}": "unfinished rollout"
    for suffix in ("json", "safetensors", "trace.parquet")
}


def kinds(run: RolloutRun, **options: float | bool) -> dict[str, str]:
    found = find_leftovers(run, **{"older_than_s": -1, "unfinished": False, **options})  # type: ignore[arg-type]
    assert found.notes == []
    return {leftover.path: leftover.kind for leftover in found.found}


def test_leftovers_are_listed_and_nothing_is_changed(run: RolloutRun) -> None:
    before = run.storage.list_files()
    assert kinds(run) == LEFTOVERS
    assert kinds(run, unfinished=True) == LEFTOVERS | OPEN_PARTS
    outcome = collect_garbage(run, older_than_s=-1)
    assert not outcome.removed and outcome.size_bytes == sum(before[path] for path in LEFTOVERS)
    assert run.storage.list_files() == before


def test_what_was_written_lately_stays(run: RolloutRun) -> None:
    found = find_leftovers(run, older_than_s=3600, unfinished=False)
    assert (found.found, found.too_young) == ([], len(LEFTOVERS))


def test_removal_takes_the_leftovers_and_nothing_else(run: RolloutRun) -> None:
    before, status = run.storage.list_files(), run_status(run)
    assert collect_garbage(run, remove=True, older_than_s=-1).removed
    after = {path: size for path, size in run.storage.list_files().items() if not path.startswith("lease/")}
    assert after == {path: size for path, size in before.items() if path not in LEFTOVERS}
    assert run_status(run).cells == status.cells
    assert len(run.commits()) == 3
    assert kinds(run) == {}
    collect_garbage(run, remove=True, older_than_s=-1, unfinished=True)
    assert not OPEN_PARTS.keys() & run.storage.list_files().keys()
    assert len(run.commits()) == 3


def test_a_file_that_only_a_broken_commit_names_stays(run: RolloutRun) -> None:
    """The other files of a commit that lost one may still save work."""
    commit = next(commit for commit in run.commits() if commit.rollout == OPEN)
    assert commit.video is not None
    run.storage.remove(commit.trace_parts[0].path)
    assert run.commits() != [] and commit.video.path not in kinds(run, unfinished=True)
    run.storage.write(f"{FINISHED.path}/commit-12.json", b"unreadable, so nobody knows what it names")
    assert not [path for path in kinds(run, unfinished=True) if path.startswith(f"{FINISHED.path}/attempt-")]


def test_nothing_is_removed_where_a_listing_hides_a_record(run: RolloutRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose listings lag behind its files shows the video of a commit and not the commit."""
    hidden = f"{OPEN.path}/commit-6.json"
    whole = run.storage.list_details
    monkeypatch.setattr(
        run.storage, "list_details", lambda prefix="": {p: d for p, d in whole(prefix).items() if p != hidden}
    )
    before = whole().keys()
    with pytest.raises(StorageError, match=r"commit-6\.json is there, but a listing does not show it"):
        collect_garbage(run, remove=True, older_than_s=-1)
    assert before <= whole().keys()


def test_nothing_is_removed_where_a_listing_hides_the_record_of_a_decoded_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RolloutRun(str(tmp_path))
    commit = store_commit(run, run.ensure(make_identity()), FINISHED, 6)
    record = store_decoded(run, commit, {"vae": "v0"})
    whole = run.storage.list_details
    for path in whole("decoded"):
        os.utime(tmp_path / path, (time.time() - BESIDE_S - 60,) * 2)
    assert kinds(run) == {}
    monkeypatch.setattr(
        run.storage, "list_details", lambda prefix="": {p: d for p, d in whole(prefix).items() if p != record}
    )
    with pytest.raises(StorageError, match=r"video-6\.json is there, but a listing does not show it"):
        kinds(run)


def test_a_run_that_grows_later_continues_from_the_parts_that_commits_name(run: RolloutRun) -> None:
    collect_garbage(run, remove=True, older_than_s=-1)
    records, broken = run.part_records(run.inventory(), FINISHED)
    assert broken == [] and max(record.end_frame for record in records) == 12


def test_what_decoding_and_scoring_are_writing_at_this_moment_stays(tmp_path: Path) -> None:
    """They may go on beside it, and a decoded video is there before the record that names it."""
    run = RolloutRun(str(tmp_path))
    run.ensure(make_identity())
    writing = [
        "decoded/s/tiny/base/00000-aa-0/attempt-x/video-6.mp4",
        "scores/preview/.tmp-0123",
        "scores/preview/1/tiny/base/00000-aa-0/6-01.parquet.invalid-0a1b2c3d",
        "summary/.tmp-01",
    ]
    for path in writing:
        run.storage.write(path, b"half")
    assert kinds(run) == {}
    assert find_leftovers(run, older_than_s=-1, unfinished=False).too_young == len(writing)
    for path in writing:
        os.utime(tmp_path / path, (time.time() - BESIDE_S - 60,) * 2)
    assert kinds(run).keys() == set(writing)


def test_unfinished_writes_of_a_folder_are_found_and_hidden_from_everybody_else(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path))
    run.ensure(make_identity())
    temporary = tmp_path / "rollouts" / "strangers" / "own" / "folder" / "attempt-x" / ".tmp-0123"
    temporary.parent.mkdir(parents=True)
    temporary.write_bytes(b"half")
    os.utime(temporary, (time.time() - 7200,) * 2)
    assert run.storage.list_files().keys() == {"run.json"}
    assert [leftover.kind for leftover in collect_garbage(run, remove=True).leftovers] == ["unfinished write"]
    assert not temporary.exists()


def test_unfinished_uploads_are_dropped_with_their_pieces(s3_bucket: str, tmp_path: Path) -> None:
    run = RolloutRun(f"{s3_bucket}/{tmp_path.name}")
    run.ensure(make_identity())
    key = f"{tmp_path.name}/{FINISHED.path}/attempt-x/video-6.mp4"
    for other in (key, f"{tmp_path.name}-another-run/video.mp4"):
        upload = run.storage.call_s3("create_multipart_upload", Bucket="runs", Key=other)["UploadId"]
        run.storage.call_s3("upload_part", Bucket="runs", Key=other, UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    # The test server begins every upload in 2010.
    (found,) = collect_garbage(run, remove=True).leftovers
    assert (found.kind, found.path, found.size_bytes) == ("unfinished upload", key.partition("/")[2], 1000)
    assert collect_garbage(run).leftovers == ()
    left = run.storage.call_s3("list_multipart_uploads", Bucket="runs")["Uploads"]
    assert [upload["Key"] for upload in left] == [f"{tmp_path.name}-another-run/video.mp4"]


def test_nothing_is_removed_while_a_driver_works(run: RolloutRun, monkeypatch: pytest.MonkeyPatch) -> None:
    lease: Lease = take_lease(run.storage, new_record("run", ttl_s=3600), lambda _: None)
    before = run.storage.list_files("rollouts")
    looks = iter(range(1000))

    def a_beat_later(_: float) -> None:
        next(looks)
        lease.renew()

    monkeypatch.setattr("lrag_ray.store.lease.time.sleep", a_beat_later)
    with pytest.raises(LeaseError, match="being worked on by"):
        collect_garbage(run, remove=True, older_than_s=-1)
    assert run.storage.list_files("rollouts") == before
    told: list[Event] = []
    collect_garbage(run, listener=told.append)
    assert any(isinstance(event, Notice) and "may be at work" in event.text for event in told)


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no run"):
        collect_garbage(RolloutRun(str(tmp_path)))

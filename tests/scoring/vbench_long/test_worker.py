"""One VBench-Long worker, without Ray: files of rows, stopping, buckets, damage."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lrag_ray.scoring.suite import StoppedError, UnscorableError
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.worker import RowFiles, VbenchTask, VbenchWorker, read_row_files, stored_rows
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import sha256_of
from lrag_ray.video.mp4 import VideoError
from tests.report.make_run import moving_frames
from tests.scoring.odd_videos import encode

SETTINGS = VbenchSettings(weights="random", dimensions=("motion_smoothness",))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """With a video of five clips."""
    encode(tmp_path / "v.mp4", moving_frames(20, seed=1, speed=1), fps=2)
    return Storage(str(tmp_path))


@pytest.fixture
def task(storage: Storage) -> VbenchTask:
    return VbenchTask("v.mp4", "v.mp4", sha256_of(Path(storage.full("v.mp4"))), "v@1", "rows", "rows-end.parquet")


def scored(storage: Storage) -> dict[int, float | None]:
    rows = stored_rows(storage, "rows")
    assert max(Counter(row.key for row in rows).values()) == 1
    return {row.first_frame: row.score for row in rows}


def test_rows_are_committed_in_files_of_whole_clips(storage: Storage, task: VbenchTask) -> None:
    VbenchWorker(storage, storage, SETTINGS, files=RowFiles(clips=2)).score(task, lambda: True)
    files = read_row_files(storage, storage.list_files("rows"))
    assert sorted(len(rows) for rows in files.values()) == [1, 2, 2]
    assert len(files["rows/rows-end.parquet"]) == 1
    assert set(scored(storage)) == {0, 4, 8, 12, 16}


def test_a_worker_that_is_stopped_leaves_its_rows_and_the_next_goes_on(storage: Storage, task: VbenchTask) -> None:
    work, looks = VbenchWorker(storage, storage, SETTINGS), iter([True, False])
    with pytest.raises(StoppedError):
        work.score(task, lambda: next(looks))
    left = scored(storage)
    assert set(left) == {0, 4} and "rows/rows-end.parquet" not in storage.list_files("rows")
    work.score(task, lambda: True)
    assert len(scored(storage)) == 5 and left.items() <= scored(storage).items()


def test_a_bucket_is_scored_like_a_folder(storage: Storage, task: VbenchTask, s3_bucket: str) -> None:
    VbenchWorker(storage, storage, SETTINGS).score(task, lambda: True)
    bucket = Storage(f"{s3_bucket}/scored")
    bucket.put_file(Path(storage.full("v.mp4")), "v.mp4")
    work = VbenchWorker(bucket, bucket, SETTINGS)
    work.score(task, lambda: True)
    assert scored(bucket) == scored(storage)
    bucket.write("v.mp4", b"other bytes")
    with pytest.raises(VideoError, match=r"v\.mp4 does not have the checksum of its commit"):
        work.score(replace(task, last_file="rows-more.parquet"), lambda: True)
    with pytest.raises(VideoError, match=r"gone\.mp4 is missing"):
        work.score(replace(task, path="gone.mp4"), lambda: True)


def test_a_video_that_cannot_be_read_is_one_row_and_refused(storage: Storage, task: VbenchTask) -> None:
    storage.write("v.mp4", b"")
    with pytest.raises(UnscorableError, match=r"^v\.mp4 is empty$"):
        VbenchWorker(storage, None, SETTINGS).score(replace(task, path=storage.full("v.mp4")), lambda: True)
    (row,) = stored_rows(storage, "rows")
    assert (row.kind, row.reason, row.video) == ("failure", "v.mp4 is empty", "v@1")


def test_shorter_durations_of_a_file_share_its_clips(storage: Storage, task: VbenchTask) -> None:
    prefixes = replace(task, path=storage.full("v.mp4"), durations_s=(3, 60))
    VbenchWorker(storage, None, SETTINGS).score(prefixes, lambda: True)
    spans = {(row.first_frame, row.frame_count) for row in stored_rows(storage, "rows")}
    assert spans == {(0, 4), (2, 4), (4, 4), (8, 4), (12, 4), (16, 4)}

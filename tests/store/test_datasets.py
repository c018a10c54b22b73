"""Latent datasets: the index says what the commits say, at any moment, and no more of it is read than needed."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lrag_ray.api import open_run
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_index import (
    MANIFEST_FILE,
    ROWS_PER_GROUP,
    FormedRow,
    IndexRow,
    IndexWriter,
    LatentForm,
    read_manifest,
)
from lrag_ray.store.dataset_rows import LeftOut, RunIndex, committed, rows_of
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.rollouts import RolloutRun
from tests.stages.make import do_all, make_config, make_prompts

NO_VIDEO = {"enabled": False}
FORM = LatentForm(channels=16, height=60, width=104, dtype="bfloat16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    """Three prompts, two methods, up to 12 latent frames in parts of 6; without an index."""
    folder = tmp_path_factory.mktemp("datasets") / "run"
    made = RolloutRun(str(folder))
    do_all(made, make_config(folder, video=NO_VIDEO), make_prompts("a red fox", "a river", "rain"))
    return made


def copy_of(run: RolloutRun, folder: Path) -> RolloutRun:
    for path in run.storage.list_files():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(run.storage.read_bytes(path))
    return RolloutRun(str(folder))


def all_rows(run: RolloutRun) -> list[FormedRow]:
    identity = run.require()
    broken: list[LeftOut] = []
    rows = rows_of(run.storage, identity, committed(identity, run.inventory()), broken.append)
    assert broken == []
    return rows


def equal(data: LatentDataset, other: LatentDataset) -> bool:
    return len(data) == len(other) and all(torch.equal(data.read(i), other.read(i)) for i in range(len(data)))


def never(text: str) -> None:
    raise AssertionError(text)


def test_a_dataset_is_what_the_run_committed(run: RolloutRun) -> None:
    data = LatentDataset.open(run.uri)
    latents = {rollout.path: tensor for rollout, tensor in open_run(run.uri).latents()}
    assert (len(data), data.shape, data.dtype) == (6, (16, 4, 6), torch.float32)
    assert data.frames.tolist() == [12] * 6
    assert {entry.rollout for entry in data.rollouts} == latents.keys()
    for index, entry in enumerate(data.rollouts):
        assert torch.equal(data.read(index), latents[entry.rollout])
        assert (
            entry.key
            == data.keys[index]
            == run.require().rollout_key(next(r for r in run.require().rollouts() if r.path == entry.rollout), 12)
        )
    assert [entry.prompt for entry in data.rollouts] == ["a red fox"] * 2 + ["a river"] * 2 + ["rain"] * 2
    assert data.columns(["prompt"])["prompt"] == [entry.prompt for entry in data.rollouts]
    assert data.rollouts[-1] == data.rollouts[5]
    assert data.rollouts[1:3] == [data.rollouts[1], data.rollouts[2]]


def test_every_window_is_the_slice_of_the_whole(run: RolloutRun) -> None:
    data = LatentDataset.open(run.uri)
    whole = data.read(2)
    for start in range(12):
        for length in range(1, 13 - start):
            assert torch.equal(data.read(2, start, length), whole[start : start + length])
    slot = torch.zeros(2, 3, 16, 4, 6)
    data.read_into(2, 5, slot[1])
    assert torch.equal(slot, torch.stack([torch.zeros(3, 16, 4, 6), whole[5:8]]))
    for wrong in (
        torch.zeros(3, 16, 4, 5),
        torch.zeros(3, 16, 4, 6).double(),
        torch.zeros(3, 16, 6, 4).transpose(2, 3),
    ):
        with pytest.raises(ValueError, match=r"expected contiguous frames \[16, 4, 6\] float32"):
            data.read_into(2, 0, wrong)
    for start, length in ((0, 13), (12, 1), (-1, 2), (3, 0)):
        with pytest.raises(IndexError, match="12 latent frames"):
            data.read(2, start, length)
    with pytest.raises(IndexError, match="6 rollouts"):
        data.rollouts[6]


def test_an_index_gives_the_same_dataset_however_it_was_cut(run: RolloutRun, tmp_path: Path) -> None:
    expected = LatentDataset.open(run.uri)
    rows = all_rows(run)
    for number, cuts in enumerate(([6], [1, 1, 1, 1, 1, 1], [2, 4], [5, 1])):
        copied = copy_of(run, tmp_path / str(number))
        writer, first = IndexWriter(copied.storage), 0
        # Arrival is in any order.
        shuffled = [rows[i] for i in np.random.default_rng(number).permutation(6)]
        for cut in cuts:
            writer.add(shuffled[first : first + cut])
            first += cut
            # Valid at any moment.
            assert len(LatentDataset.open(copied.uri)) == first
        data = LatentDataset.open(copied.uri)
        assert equal(data, expected)
        assert (data.digest, data.keys) == (expected.digest, expected.keys)
        assert [entry._replace(run="") for entry in data.rollouts] == [e._replace(run="") for e in expected.rollouts]


def test_an_open_dataset_stays_as_it_was_while_the_index_grows_and_is_merged(run: RolloutRun, tmp_path: Path) -> None:
    copied, rows = copy_of(run, tmp_path), all_rows(run)
    writer = IndexWriter(copied.storage)
    writer.add(rows[:1])
    early = LatentDataset.open(copied.uri)
    writer.add(rows[1:3])
    middle = pickle.loads(pickle.dumps(LatentDataset.open(copied.uri)))
    writer.add(rows[3:])
    # Merged segments may be removed at any time.
    kept = {segment.path for segment in writer.manifest.segments}
    copied.storage.remove_many([p for p in copied.storage.list_files("dataset/index") if p not in kept])
    assert (len(early), len(middle), len(LatentDataset.open(copied.uri))) == (1, 3, 6)
    latents = {rollout.path: tensor for rollout, tensor in open_run(run.uri).latents()}
    for data in (early, middle):
        for index, entry in enumerate(data.rollouts):
            assert torch.equal(data.read(index, 3, 5), latents[entry.rollout][3:8])
    stale = LatentDataset.open(copied.uri)
    again = IndexWriter(copied.storage)
    again.add(rows)
    copied.storage.remove_many([p for p in kept if p not in {s.path for s in again.manifest.segments}])
    with pytest.raises(StorageError, match="made anew since"):
        stale.read(0)


def test_the_index_follows_commits_and_is_made_anew_where_it_contradicts_them(run: RolloutRun, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path)
    expected = LatentDataset.open(run.uri).digest
    identity, inventory = copied.require(), copied.inventory()
    rollouts = list(identity.rollouts())
    index = RunIndex(copied, identity)
    index.add(rollouts[:2], never)
    index.add(rollouts[1:3], never)
    assert index.writer.manifest.rollouts == 3
    generation = index.writer.manifest.generation
    # What a killed driver left is continued.
    index = RunIndex(copied, identity)
    index.catch_up(inventory, never)
    assert (index.writer.manifest.rollouts, index.writer.manifest.generation) == (6, generation)
    assert LatentDataset.open(copied.uri).digest == expected
    written = copied.storage.list_files("dataset")
    RunIndex(copied, identity).catch_up(inventory, never)
    assert copied.storage.list_files("dataset") == written
    # A commit that no longer counts leaves the dataset.
    lost = index.writer.manifest
    copied.storage.remove(f"{rollouts[4].path}/commit-12.json")
    copied.storage.remove(f"{rollouts[4].path}/commit-6.json")
    index = RunIndex(copied, identity)
    index.catch_up(copied.inventory(), never)
    assert index.writer.manifest.rollouts == 5
    assert index.writer.manifest.generation != lost.generation
    # A damaged index is made anew, and that is said.
    copied.storage.write(MANIFEST_FILE, b"{}")
    said: list[str] = []
    RunIndex(copied, identity).catch_up(copied.inventory(), said.append)
    assert len(said) == 1 and "made anew" in said[0]
    assert len(LatentDataset.open(copied.uri)) == 5


def test_a_shorter_horizon_counts_until_the_longer_one_is_there(run: RolloutRun, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path)
    rollout = next(copied.require().rollouts())
    whole, keys = LatentDataset.open(run.uri), LatentDataset.open(run.uri).keys
    copied.storage.remove(f"{rollout.path}/commit-12.json")
    data = LatentDataset.open(copied.uri)
    at = next(i for i, entry in enumerate(data.rollouts) if entry.rollout == rollout.path)
    assert data.frames[at] == 6 and data.digest != whole.digest
    # The split does not depend on how far a rollout was made.
    assert data.keys == keys
    assert torch.equal(data.read(at), whole.read(at, 0, 6))


def test_runs_are_joined_and_a_rollout_of_several_counts_once(run: RolloutRun, tmp_path: Path) -> None:
    other = RolloutRun(str(tmp_path / "other"))
    do_all(other, make_config(tmp_path / "other", video=NO_VIDEO, durations_s=[1.5]), make_prompts("a red fox", "snow"))
    joined = LatentDataset.open(run.uri, other.uri)
    assert (len(joined), joined.duplicates) == (8, 2)
    assert len(set(joined.keys)) == 8
    # The first address has the longer rollout of the fox.
    assert sorted(joined.frames.tolist()) == [6, 6, *[12] * 6]
    backwards = LatentDataset.open(other.uri, run.uri)
    assert sorted(backwards.frames.tolist()) == [6, 6, 6, 6, *[12] * 4]
    for index, entry in enumerate(joined.rollouts):
        alone = LatentDataset.open(entry.run)
        at = next(i for i, e in enumerate(alone.rollouts) if e.rollout == entry.rollout)
        assert torch.equal(joined.read(index, 1, 4), alone.read(at, 1, 4))
    with pytest.raises(UsageError, match="named twice"):
        LatentDataset.open(run.uri, run.uri)


def test_datasets_of_different_shapes_are_not_joined(run: RolloutRun, tmp_path: Path) -> None:
    IndexWriter(Storage(str(tmp_path))).add(synthetic(1))
    with pytest.raises(UsageError, match=r"\[16, 4, 6\] float32.*\[16, 60, 104\] bfloat16"):
        LatentDataset.open(run.uri, str(tmp_path))
    writer = IndexWriter(Storage(str(tmp_path)), read_manifest(Storage(str(tmp_path))))
    with pytest.raises(StorageError, match="one shape"):
        writer.add(all_rows(run)[:1])


def test_what_is_no_dataset_is_named(run: RolloutRun, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no dataset"):
        LatentDataset.open(str(tmp_path / "nothing"))
    empty = RolloutRun(str(tmp_path / "empty"))
    empty.ensure(run.require())
    with pytest.raises(UsageError, match="no finished rollout"):
        LatentDataset.open(empty.uri)


def test_many_threads_read_at_once(run: RolloutRun, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path)
    IndexWriter(copied.storage).add(all_rows(run))
    expected = [LatentDataset.open(run.uri).read(i) for i in range(6)]
    for _ in range(20):
        data = LatentDataset.open(copied.uri)
        with ThreadPoolExecutor(8) as threads:
            read = list(threads.map(lambda i: (data.rollouts[i % 6].frames, data.read(i % 6)), range(24)))  # noqa: B023
        assert all(torch.equal(latents, expected[i % 6]) for i, (_, latents) in enumerate(read))


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_parts_are_named(run: RolloutRun, tmp_path: Path, damage: str) -> None:
    copied = copy_of(run, tmp_path)
    data = LatentDataset.open(copied.uri)
    path = data.parts(0)[-1].path
    file = tmp_path / path
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    data.read(0, 0, 6)
    with pytest.raises(StorageError, match=rf"{path} (is missing|ends 8 bytes before).*dataset verify"):
        data.read(0, 6, 6)


@pytest.mark.parametrize("kind", ["segment", "manifest", "escape", "rows"])
def test_a_damaged_index_is_an_error_with_the_fix(run: RolloutRun, tmp_path: Path, kind: str) -> None:
    copied = copy_of(run, tmp_path)
    writer = IndexWriter(copied.storage)
    writer.add(all_rows(run))
    (segment,) = writer.manifest.segments
    manifest = tmp_path / MANIFEST_FILE
    if kind == "segment":
        data = bytearray((tmp_path / segment.path).read_bytes())
        data[4:400] = bytes(396)
        (tmp_path / segment.path).write_bytes(data)
    elif kind == "manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif kind == "escape":
        manifest.write_text(manifest.read_text().replace("dataset/index/", "dataset/index/../../"))
    else:
        manifest.write_text(manifest.read_text().replace('"rollouts": 6', '"rollouts": 7'))
    with pytest.raises(StorageError, match=r"dataset/index|not inside the run"):
        opened = LatentDataset.open(copied.uri)
        for index in range(len(opened)):
            opened.read(index)
            opened.rollouts[index]


class CountingStorage(Storage):
    """Counts the bytes that are read."""

    read = 0

    def read_bytes(self, path: str) -> bytes:
        data = super().read_bytes(path)
        CountingStorage.read += len(data)
        return data

    def read_into(self, path: str, start: int, buffer: bytearray | memoryview) -> int:
        got = super().read_into(path, start, buffer)
        CountingStorage.read += got
        return got


def synthetic(rollouts: int, first: int = 0) -> list[FormedRow]:
    """Rows of rollouts of 90 latent frames in four parts, with random digests as real ones are."""
    random = np.random.default_rng(first)
    rows = []
    for number in range(first, first + rollouts):
        digests = [random.bytes(32).hex() for _ in range(6)]
        folder = f"rollouts/longlive/base/{number:05d}-{digests[5][:8]}-0"
        parts = [
            f"{folder}/attempt-20260101T000000-{digests[4][:8]}/part-{i:05d}-{i + 24:05d}" for i in range(0, 90, 24)
        ]
        row = IndexRow(
            key=digests[0], prompt_index=number, sample=0, frames=90, part=[f"{p}.safetensors" for p in parts],
            part_first_frame=[0, 24, 48, 72], part_frames=[24, 24, 24, 18], part_offset=[88] * 4,
            part_bytes=[24 * FORM.frame_bytes + 88] * 3 + [18 * FORM.frame_bytes + 88], part_sha256=digests[:4],
            rollout=folder, backbone="longlive", method="base", prompt_id=f"{number:05d}-{digests[5][:8]}",
            prompt=random.bytes(150).hex(), latents_digest=digests[1],
        )  # fmt: skip
        rows.append(FormedRow(row, FORM))
    return rows


@pytest.mark.proof
def test_a_large_index_is_opened_and_planned_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, batch = 100_000, 25_000
    writer = IndexWriter(Storage(str(tmp_path)))
    for first in range(0, rollouts, batch):
        writer.add(synthetic(batch, first))
    size = sum(segment.size_bytes for segment in writer.manifest.segments)
    monkeypatch.setattr("lrag_ray.store.datasets.Storage", CountingStorage)

    def read_by(act: object) -> int:
        CountingStorage.read = 0
        assert callable(act)
        act()
        return CountingStorage.read

    opened: list[LatentDataset] = []
    assert read_by(lambda: opened.append(LatentDataset.open(str(tmp_path)))) < 10_000
    data = opened[0]
    # Order, split and windows: three of sixteen columns, of which the keys are random.
    planned = read_by(lambda: (data.frames.sum(), data.keys, len(data)))
    assert planned < 0.15 * size
    # One rollout: a row group.
    one = read_by(lambda: data.rollouts[77_777])
    assert one < 2 * size * ROWS_PER_GROUP / rollouts + 200_000
    assert data.rollouts[77_777].prompt_index == 77_777
    monkeypatch.setattr("lrag_ray.store.datasets._Source._read_piece", lambda *_: None)
    assert read_by(lambda: data.read(12_345, 20, 8)) < size * ROWS_PER_GROUP / rollouts
    assert len(data) == rollouts and data.frames.sum() == 90 * rollouts


def test_a_dataset_in_a_bucket_is_read_by_byte_range(run: RolloutRun, s3_bucket: str, tmp_path: Path) -> None:
    uri = f"{s3_bucket}/{tmp_path.name}"
    copied = RolloutRun(uri)
    for path in run.storage.list_files():
        copied.storage.write(path, run.storage.read_bytes(path))
    index = RunIndex(copied, copied.require())
    index.catch_up(copied.inventory(), never)
    data, local = LatentDataset.open(uri), LatentDataset.open(run.uri)
    assert data.digest == local.digest
    assert all(torch.equal(data.read(i, 4, 5), local.read(i, 4, 5)) for i in range(6))
    part = data.parts(0)[-1]
    assert copied.storage.read_range(part.path, part.size_bytes - 4, part.size_bytes + 4) == run.storage.read_range(
        local.parts(0)[-1].path, part.size_bytes - 4, part.size_bytes + 4
    )
    assert copied.storage.read_range(part.path, part.size_bytes + 10, part.size_bytes + 20) == b""
    copied.storage.write(part.path, run.storage.read_bytes(local.parts(0)[-1].path)[:-8])
    with pytest.raises(StorageError, match="ends 8 bytes before"):
        data.read(0, 6, 6)
    copied.storage.remove(part.path)
    with pytest.raises(StorageError, match="is missing"):
        data.read(0, 6, 6)

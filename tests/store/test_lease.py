"""Who holds the lease, on a local folder and on an object store; drivers here are records, some of real processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lrag_ray.errors import LeaseError, StorageError
from lrag_ray.store import lease as lease_module
from lrag_ray.store.address import Storage
from lrag_ray.store.lease import DECODE, FOLDER, Lease, LeaseRecord, holder, new_record, take_lease
from lrag_ray.store.process import ProcessIdentity, this_process
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.store.make import make_identity

TTL_S = 1.2


@pytest.fixture
def storage(run_uri: str) -> Storage:
    return Storage(run_uri)


class Told:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> None:
        self.texts.append(text)


def elsewhere(**changes: object) -> LeaseRecord:
    """A driver on another machine: nothing here can tell whether it lives."""
    process = ProcessIdentity(host="node3", pid=4711, space="another boot", started="1")
    record = new_record("run", TTL_S)
    return record.model_copy(update={"id": record.id + "x", "user": "ada", "process": process, **changes})


def take(storage: Storage, record: LeaseRecord | None = None, told: Told | None = None) -> Lease:
    return take_lease(storage, record or new_record("run", TTL_S), told or Told())


def test_a_folder_that_cannot_be_made_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (Path("/proc/nothing/run"), tmp_path / "file" / "run"):
        expected = rf"cannot (make the folder|read) {folder}.*: .*\. (Check the path|A file is)"
        with pytest.raises(StorageError, match=expected):
            take(Storage(str(folder)))


def test_nobody_holds_a_new_run_and_a_lease_given_back_is_taken_at_once(storage: Storage) -> None:
    assert holder(storage) is None
    first = take(storage, elsewhere())
    found = holder(storage)
    assert found is not None and found.record == first.record and not found.is_free
    assert str(found) == f"ada on node3 (lrag-ray run, process 4711) since {first.record.started_at}"
    first.release()
    found = holder(storage)
    assert found is not None and found.is_free

    told = Told()
    second = take(storage, told=told)
    assert (first.epoch, second.epoch, told.texts) == (1, 2, [])
    second.release()
    for _ in range(10):
        take(storage).release()
    assert len(storage.list_files(FOLDER)) == 16, "the last eight stay"


@pytest.fixture
def beating(storage: Storage) -> Iterator[Lease]:
    """A driver elsewhere that shows its signs of life, however slowly this machine lets it."""
    lease, stop = take(storage, elsewhere(ttl_s=60)), threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            lease.renew()

    thread = threading.Thread(target=beat)
    thread.start()
    yield lease
    stop.set()
    thread.join()


def test_a_driver_that_lives_is_left_its_lease_and_named(storage: Storage, beating: Lease) -> None:
    told = Told()
    with pytest.raises(LeaseError, match=r"worked on by ada on node3 \(lrag-ray run, process 4711\) since"):
        take(storage, told=told)
    assert len(told.texts) == 1 and "Waiting for a sign of life" in told.texts[0]
    found = holder(storage)
    assert found is not None and found.epoch == beating.epoch


def test_a_driver_without_a_sign_of_life_is_replaced_after_its_ttl_and_finds_out(storage: Storage) -> None:
    silent = take(storage, elsewhere())
    told = Told()
    began = time.monotonic()
    successor = take(storage, new_record("run", 60), told)
    assert time.monotonic() - began >= TTL_S
    assert successor.epoch == silent.epoch + 1
    assert "ada on node3" in told.texts[-1] and told.texts[-1].endswith("this driver takes over")
    with pytest.raises(LeaseError, match="was taken over by"):
        silent.renew()
    assert "lease/00000001.beat" not in storage.list_files(FOLDER)
    successor.renew()


def test_a_machine_that_stood_still_as_a_whole_takes_no_lease_from_a_driver_that_lives(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both drivers were asleep (a virtual machine that was moved): the one that waits wakes up first."""
    alive, now = take(storage, elsewhere(ttl_s=60)), [0.0]

    def sleep(_: float) -> None:
        if now[0]:
            alive.renew()
        now[0] += 1000

    monkeypatch.setattr(lease_module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    with pytest.raises(LeaseError, match="worked on by ada"):
        take(storage)


def test_a_process_of_this_machine_that_has_ended_is_replaced_at_once(storage: Storage) -> None:
    program = "from lrag_ray.store.process import this_process; print(this_process().model_dump_json()); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        identity = ProcessIdentity.model_validate_json(process.stdout.readline())
        take(storage, elsewhere(process=identity, ttl_s=600))
        found = holder(storage)
        assert found is not None and not found.is_free
        process.kill()
        process.wait()
        assert take(storage).epoch == 2
    assert identity.is_gone
    # The number may be given to another process.
    me = this_process()
    assert not me.is_gone and me.model_copy(update={"started": "1"}).is_gone
    assert not me.model_copy(update={"space": "another boot", "pid": 2**22 + 1}).is_gone


def test_of_many_drivers_at_the_same_moment_one_gets_the_lease(storage: Storage) -> None:
    take(storage).release()
    began = threading.Barrier(6)
    got: list[Lease] = []
    refused: list[str] = []

    def contend() -> None:
        began.wait()
        try:
            lease = take(storage, elsewhere(ttl_s=30))
        except LeaseError as error:
            refused.append(str(error))
            return
        got.append(lease)
        deadline = time.monotonic() + 60
        while len(refused) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
            lease.renew()

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)
    assert max(storage.list_files(FOLDER)) == f"lease/{got[0].epoch:08d}.json"


def test_a_slow_contender_below_the_highest_epoch_gets_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw epoch 1; until it creates epoch 2, that one and ten others have come and gone."""
    take(storage, elsewhere()).release()
    create = storage.create
    overtaken = False

    def late_create(path: str, data: bytes) -> bool:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            for _ in range(11):
                take(Storage(storage.address)).release()
            assert path not in storage.list_files(FOLDER)
        return create(path, data)

    monkeypatch.setattr(storage, "create", late_create)
    assert take(storage).epoch == 13
    assert "lease/00000002.json" not in storage.list_files(FOLDER)


def test_a_record_that_cannot_be_read_does_not_lock_the_run_for_ever(storage: Storage) -> None:
    storage.write("lease/00000009.json", b"not json")
    told = Told()
    assert take(storage, told=told).epoch == 10
    assert "a driver whose record cannot be read" in told.texts[0]


def test_status_names_who_is_at_work(run_uri: str) -> None:
    run = RolloutRun(run_uri)
    run.ensure(make_identity())
    assert run_status(run).held_by is None
    lease = take(run.storage, elsewhere())
    lease.renew()
    held_by = run_status(run).held_by
    assert held_by is not None
    assert held_by.startswith(f"{lease.record}, last sign of life 20")
    lease.release()
    assert run_status(run).held_by is None


def test_another_kind_of_work_has_a_lease_of_its_own_and_status_names_all(storage: Storage) -> None:
    run = RolloutRun(storage.address)
    run.ensure(make_identity())
    generating = take(storage, elsewhere(command="run", ttl_s=600))
    decoding = take_lease(storage, elsewhere(command="decode", ttl_s=600), Told(), DECODE)
    scoring = take_lease(storage, elsewhere(command="score", ttl_s=600), Told(), "scores/preview")
    assert (generating.epoch, decoding.epoch, scoring.epoch) == (1, 1, 1)
    held_by = run_status(run).held_by or ""
    assert all(f"(lrag-ray {command}, process 4711)" in held_by for command in ("run", "decode", "score"))
    decoding.release()
    generating.release()
    assert take(storage).epoch == 2
    held_by = run_status(run).held_by or ""
    assert "lrag-ray decode" not in held_by and "lrag-ray score" in held_by


def test_who_is_patient_waits_for_the_end_of_a_driver_that_lives(storage: Storage) -> None:
    alive, told = take(storage, elsewhere(ttl_s=60)), Told()

    def live_and_end() -> None:
        for _ in range(5):
            time.sleep(0.2)
            alive.renew()
        alive.release()

    thread = threading.Thread(target=live_and_end)
    thread.start()
    assert take_lease(storage, new_record("report", TTL_S), told, patient=True).epoch == 2
    thread.join()
    assert told.texts == [f"{storage.uri} is held by {alive.record}. Waiting for its end"]


def test_a_copy_of_a_run_is_not_held_by_the_driver_of_the_original(run_uri: str, tmp_path: Path) -> None:
    """On this machine, and of a disk in a bucket; of another machine's disk nothing is known, so it is waited for."""
    original = RolloutRun(run_uri)
    original.ensure(make_identity())
    holding = take(original.storage, new_record("run", 600))
    for copy in (RolloutRun(str(tmp_path / "copy")), RolloutRun(f"{run_uri}-copy")):
        for path, data in original.storage.read_many(list(original.storage.list_files())).items():
            copy.storage.write(path, data)
        status = run_status(copy)
        assert (status.held_by, status.lost) == (None, None)
        told = Told()
        assert take(copy.storage, told=told).epoch == 2 and told.texts == []
        holding.renew()
    status = run_status(original)
    assert status.held_by is not None and status.held_by.startswith(str(holding.record))

    if original.storage.is_local:
        unknown = holding.record.model_copy(update={"process": elsewhere().process})
        copy.storage.write("lease/00000003.json", unknown.model_dump_json().encode())
        found = holder(copy.storage)
        assert found is not None and not found.is_free


def test_a_listing_that_lags_hides_no_holder(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """New names show in no listing for a while, removed ones in every; what is asked for by name is there or not."""
    whole, shown = storage.list_files, dict[str, int]()
    monkeypatch.setattr(storage, "list_files", lambda prefix="": {p: shown[p] for p in shown if p.startswith(prefix)})
    first = take(storage, elsewhere())
    assert first.epoch == 1 and (found := holder(storage)) is not None and found.record == first.record
    first.release()
    for epoch in range(2, 7):
        lease = take(storage, elsewhere())
        assert lease.epoch == epoch
        lease.release()
    shown = whole()
    for _ in range(6):
        take(storage, elsewhere()).release()
    assert (found := holder(storage)) is not None and found.epoch == 12
    gone = sorted(set(shown) - set(whole()))
    assert gone, "the listing shows none that have been removed"

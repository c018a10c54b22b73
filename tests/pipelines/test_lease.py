"""The keeper of the lease: stops a driver that was replaced or cannot reach its storage, and gives the lease back."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lrag_ray.errors import IdentityError, LeaseError
from lrag_ray.events import Event, silent
from lrag_ray.pipelines.evaluate import evaluate as run
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.lease import keep_lease
from lrag_ray.store.address import Storage
from lrag_ray.store.lease import holder, new_record
from lrag_ray.store.rollouts import RolloutRun
from tests.stages.make import make_config, make_prompts

TTL_S = 6.0
"""Long enough for a beat on a busy machine."""


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """The folder of its lease is a link, so that `switch` takes it away and brings it back in one step."""
    (tmp_path / "leases").mkdir()
    (tmp_path / "file").write_text("no folder")
    switch(tmp_path, "leases")
    return Storage(str(tmp_path))


def switch(folder: Path, target: str) -> None:
    """Let the folder of the lease be `target`; in its place a file, nothing can be written."""
    (folder / "next").symlink_to(target)
    (folder / "next").replace(folder / "lease")


def take_over(storage: Storage) -> None:
    """What another driver does that believes this one dead."""
    found = holder(storage)
    assert found is not None
    record = new_record("run", TTL_S).model_copy(update={"user": "ada"})
    assert storage.create(f"lease/{found.epoch + 1:08d}.json", record.model_dump_json().encode())


def test_the_lease_is_renewed_and_given_back_however_the_block_ends(storage: Storage) -> None:
    with keep_lease(storage, "run", ["run"], ttl_s=TTL_S, listener=silent):
        before = holder(storage)
        assert before is not None and before.sign is not None and not before.is_free
        with (
            pytest.raises(LeaseError, match="being worked on"),
            keep_lease(storage, "gc", ["run"], ttl_s=9, listener=silent),
        ):
            pytest.fail("two drivers at once")
        after = holder(storage)
        assert after is not None and after.sign is not None and after.sign.count > before.sign.count
    with pytest.raises(KeyboardInterrupt), keep_lease(storage, "run", ["run"], ttl_s=TTL_S, listener=silent):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="a bug"), keep_lease(storage, "run", ["run"], ttl_s=TTL_S, listener=silent):
        raise ValueError("a bug")
    found = holder(storage)
    assert found is not None and found.epoch == 3 and found.is_free


def test_a_driver_that_was_replaced_is_stopped_with_the_name_of_the_other(storage: Storage) -> None:
    before = signal.getsignal(signal.SIGURG)
    with (
        pytest.raises(LeaseError, match=r"was taken over by ada on .* so this driver .* stops"),
        keep_lease(storage, "run", ["run"], ttl_s=TTL_S, listener=silent),
    ):
        take_over(storage)
        time.sleep(120)
        pytest.fail("it was not stopped")
    assert signal.getsignal(signal.SIGURG) == before
    found = holder(storage)
    assert found is not None and found.epoch == 2 and not found.is_free, "the other's lease was touched"


def test_a_driver_in_another_thread_is_stopped_as_well(storage: Storage) -> None:
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            with keep_lease(storage, "run", ["run"], ttl_s=TTL_S, listener=silent):
                take_over(storage)
                for _ in range(1200):
                    time.sleep(0.1)
                errors.append(AssertionError("it was not stopped"))
        except LeaseError as error:
            errors.append(error)

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "was taken over by ada" in str(errors[0])


def test_a_lease_that_cannot_be_renewed_stops_the_driver_after_its_ttl(storage: Storage, tmp_path: Path) -> None:
    with (
        pytest.raises(LeaseError, match=r"could not be renewed for 2 s.*cannot (write|list)"),
        keep_lease(storage, "run", ["run"], ttl_s=2, listener=silent),
    ):
        began = time.monotonic()
        switch(tmp_path, "file")
        time.sleep(120)
        pytest.fail("it was not stopped")
    assert time.monotonic() - began > 1


def test_a_short_trouble_of_the_storage_is_borne(storage: Storage, tmp_path: Path) -> None:
    with keep_lease(storage, "run", ["run"], ttl_s=TTL_S, listener=silent):
        before = beats(storage)
        switch(tmp_path, "file")
        time.sleep(TTL_S / 4)
        switch(tmp_path, "leases")
        deadline = time.monotonic() + 60
        while beats(storage) < before + 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert beats(storage) >= before + 3
    found = holder(storage)
    assert found is not None and found.is_free


def beats(storage: Storage) -> int:
    """Signs of life so far."""
    found = holder(storage)
    assert found is not None and found.sign is not None
    return found.sign.count


def test_a_lease_that_cannot_be_given_back_is_told_and_masks_nothing(storage: Storage, tmp_path: Path) -> None:
    events: list[Event] = []
    with (
        pytest.raises(ValueError, match="the reason"),
        keep_lease(storage, "run", ["run"], ttl_s=600, listener=events.append),
    ):
        switch(tmp_path, "file")
        raise ValueError("the reason")
    assert "could not be given back" in str(events[-1])


STUBBORN = """
import sys, time
from lrag_ray.pipelines import lease
from lrag_ray.events import silent
from lrag_ray.store.address import Storage
lease.STOP_WITHIN_S = 1.0
with lease.keep_lease(Storage(sys.argv[1]), "run", ["run"], ttl_s=6, listener=silent):
    print("held", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


def test_a_driver_that_does_not_stop_is_ended_the_hard_way(storage: Storage) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN, storage.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == b"held\n"
        take_over(storage)
        _, errors = driver.communicate(timeout=240)
    assert driver.returncode == 3
    assert b"error: " in errors and b"was taken over by ada" in errors


def test_another_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    prompts = make_prompts("a red fox")
    directory = RolloutRun(str(tmp_path))
    directory.ensure(build_identity(make_config(tmp_path), prompts))
    before = directory.storage.list_details()
    with pytest.raises(IdentityError, match=r"run\.seed"):
        run(make_config(tmp_path, run={"uri": str(tmp_path), "seed": 1}), prompts)
    assert directory.storage.list_details() == before

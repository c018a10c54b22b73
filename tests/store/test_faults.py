"""Storage before a store that fails: a real S3 server behind a proxy that cuts, stalls and refuses."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import StorageError
from lrag_ray.store import retry, waits
from lrag_ray.store.address import Storage
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from lrag_ray.store.waits import reporting_waits
from tests.store.fault_proxy import TRANSIENT, Fault, FaultProxy, scripted, seeded
from tests.store.make import make_identity, rollout_id, store_commit


@pytest.fixture
def proxy(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]).running() as running:
        yield running


def options(proxy: FaultProxy, fault: Fault | None = None, **changes: float) -> StorageSection:
    # Only a silence is waited for: a server that is merely slow must not be asked twice.
    patience = {"read_timeout_s": 0.5} if fault == "silence" else {}
    return StorageSection.model_validate({"endpoint_url": proxy.endpoint, **patience, **changes})


@pytest.fixture
def storage(proxy: FaultProxy, s3_bucket: str, tmp_path: Path, request: pytest.FixtureRequest) -> Storage:
    """With `attempts` 2, which leaves each request three tries of botocore's in each of two of ours."""
    fault = request.getfixturevalue("fault") if "fault" in request.fixturenames else None
    return Storage(f"{s3_bucket}/{tmp_path.name}", options(proxy, fault, attempts=2))


@pytest.mark.parametrize("fault", TRANSIENT)
def test_passing_trouble_is_not_noticed(proxy: FaultProxy, storage: Storage, tmp_path: Path, fault: Fault) -> None:
    local = tmp_path / "video.mp4"
    local.write_bytes(b"frames" * 1000)
    for method, operation in (
        ("PUT", lambda: storage.write("a.txt", b"written")),
        ("PUT", lambda: storage.create("commit.json", b"mine")),
        ("PUT", lambda: storage.put_file(local, "video.mp4")),
        ("GET", lambda: storage.list_files()),
        ("GET", lambda: storage.read_bytes("a.txt")),
        ("GET", lambda: storage.get_file("a.txt", tmp_path / "a.txt")),
        ("PUT", lambda: storage.move("a.txt", "b.txt")),
        ("DELETE", lambda: storage.remove("commit.json")),
    ):
        proxy.choose = scripted([fault], method=method)
        before = proxy.injected[fault]
        operation()
        assert proxy.injected[fault] == before + 1
    assert (tmp_path / "a.txt").read_bytes() == b"written"
    assert storage.list_files() == {"b.txt": 7, "video.mp4": 6000}


@pytest.mark.parametrize("fault", ["InternalError", "SlowDown", "RequestTimeout", "silence"])
def test_with_one_try_the_same_trouble_is_an_error(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, fault: Fault
) -> None:
    once = Storage(f"{s3_bucket}/{tmp_path.name}", options(proxy, fault, attempts=1))
    proxy.choose = scripted([fault])
    with pytest.raises(StorageError, match=r"1 try in .* the same command continues"):
        once.write("c.txt", b"x")


def test_a_create_whose_answer_was_lost_is_known_as_our_own(proxy: FaultProxy, storage: Storage) -> None:
    proxy.choose = scripted(["reset after"], method="PUT")
    assert storage.create("commit.json", b"attempt one")
    assert proxy.injected["reset after"] == 1 and proxy.requests["PUT"] == 2
    assert not storage.create("commit.json", b"attempt two")
    proxy.choose = scripted(["reset after", "reset after"], method="PUT")
    assert not storage.create("commit.json", b"attempt three")
    assert storage.read_bytes("commit.json") == b"attempt one"


def test_a_refused_create_is_no_lost_race_where_nothing_is_there(proxy: FaultProxy, storage: Storage) -> None:
    proxy.choose = scripted(["PreconditionFailed"], method="PUT")
    assert storage.create("commit.json", b"mine")
    proxy.choose = scripted(["PreconditionFailed"] * 100, method="PUT")
    with pytest.raises(StorageError, match="a create was refused, and nothing is there"):
        storage.create("other.json", b"mine")


def test_bytes_that_changed_on_their_way_are_read_again(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    storage.write("a.txt", b"written")
    proxy.choose = scripted(["other bytes"], method="GET")
    assert storage.read_bytes("a.txt") == b"written"
    proxy.choose = scripted(["other bytes"], method="GET")
    storage.get_file("a.txt", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"written" and proxy.injected["other bytes"] == 2


def test_a_wait_is_told_with_its_trouble_and_its_end(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store recovers once the person before the command has been told what ails it."""
    monkeypatch.setattr("lrag_ray.store.waits.TELL_AFTER_S", 0.04)
    monkeypatch.setattr("lrag_ray.store.waits._TELL_AGAIN_S", 0.0)
    told: list[str] = []
    heard = threading.Event()

    def hear(text: str) -> None:
        told.append(text)
        if "SlowDown" in text:
            heard.set()

    def choose(method: str, path: str) -> Fault | None:
        return None if heard.is_set() else "SlowDown"

    proxy.choose = choose
    slow = Storage(f"{s3_bucket}/{tmp_path.name}", options(proxy, attempts=1000))
    with reporting_waits(hear):
        slow.write("a.txt", b"x")
    assert heard.is_set() and all(text.startswith(f"still waiting to write {slow.uri}/a.txt after ") for text in told)
    assert any(re.search(r"the last try ended with SlowDown; it is tried for up to \d+ s more$", text) for text in told)


def test_a_process_that_stood_still_itself_does_not_blame_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    looks = iter([False, False, True])
    ended = SimpleNamespace(wait=lambda _: next(looks))
    with waits.waiting("write a.txt", 60):
        monkeypatch.setattr(waits, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 1000))
        waits._watch(told.append, ended)  # type: ignore[arg-type]
    assert told == []


def test_a_store_that_stays_down_is_given_up_after_the_configured_tries(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path
) -> None:
    down = Storage(f"{s3_bucket}/{tmp_path.name}", options(proxy, attempts=3))
    proxy.choose = scripted(["SlowDown"] * 100)
    with pytest.raises(StorageError, match=r"cannot write s3://.*a\.txt.*3 tries in .*storage\.endpoint_url"):
        down.write("a.txt", b"x")
    assert proxy.requests["PUT"] == 3 * 3
    nobody = Storage("s3://runs/x", StorageSection(endpoint_url="http://127.0.0.1:9", attempts=2, retry_for_s=5))
    with pytest.raises(StorageError, match=r"EndpointConnectionError.*storage\.endpoint_url"):
        nobody.read_bytes("run.json")
    hurried = Storage(f"{s3_bucket}/{tmp_path.name}", options(proxy, retry_for_s=0))
    with pytest.raises(StorageError, match="1 try in"):
        hurried.write("a.txt", b"x")


@pytest.mark.parametrize(
    ("fault", "fix"),
    [
        ("AccessDenied", "s3:PutObject|allow them to list, get, put"),
        ("NoSuchBucket", "The bucket does not exist: create it"),
        ("ExpiredToken", "expired: renew them"),
        ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ("RequestTimeTooSkewed", "clock of .* UTC.* differs"),
        ("QuotaExceeded", "quota is used up: free some space"),
    ],
)
def test_lasting_trouble_is_told_at_once_with_its_fix(
    proxy: FaultProxy, storage: Storage, fault: Fault, fix: str
) -> None:
    proxy.choose = scripted([fault] * 100)
    with pytest.raises(StorageError, match=f"{fault}.*{fix}"):
        storage.write("a.txt", b"x")
    with pytest.raises(StorageError, match=f"{fault}.*{fix}"):
        storage.read_bytes("run.json")
    with pytest.raises(StorageError, match=f"{fault}.*{fix}"):
        storage.list_files()
    assert proxy.requests["PUT"] == 1


def test_a_listing_that_is_refused_is_no_empty_folder(proxy: FaultProxy, storage: Storage) -> None:
    assert storage.list_files() == storage.list_files_in_shares("", 1) == {}
    proxy.choose = scripted(["NoSuchKey"] * 100)
    for listing in (storage.list_files, lambda: storage.list_files_in_shares("", 1)):
        with pytest.raises(StorageError, match=r"cannot list .*: NoSuchKey"):
            listing()


def test_an_answer_of_no_store_is_told_as_such(proxy: FaultProxy, storage: Storage) -> None:
    proxy.choose = scripted(["no store"] * 100)
    with pytest.raises(StorageError, match=r"cannot read .*: 404: .*not from an S3 store: .*endpoint_url"):
        storage.read_bytes("run.json")


def test_who_forgot_to_name_a_store_is_told_that_amazon_was_asked(
    proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests to Amazon's name reach the test's own server, as through the proxy of a company."""
    proxy.choose = scripted(["NoSuchBucket"] * 100)
    with pytest.raises(StorageError, match="NoSuchBucket") as caught:
        Storage("s3://own-bucket/run", options(proxy)).list_files()
    assert "Amazon" not in str(caught.value)
    monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
    amazon = StorageSection(endpoint_url="http://s3.us-east-1.amazonaws.com")
    with pytest.raises(
        StorageError, match=r"bucket does not exist: .*Amazon's S3 that was asked: .*with AWS_ENDPOINT_URL"
    ):
        Storage("s3://own-bucket/run", amazon).list_files()


def test_credentials_that_are_not_there_are_asked_for(
    proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = StorageSection(endpoint_url=proxy.endpoint, profile="nobody-has-this")
    with pytest.raises(StorageError, match=r"storage\.profile"):
        Storage(f"{s3_bucket}/x", absent).read_bytes("run.json")


def test_a_run_is_written_and_read_through_a_store_where_one_request_in_five_fails(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path
) -> None:
    quick: tuple[Fault, ...] = tuple(fault for fault in TRANSIENT if fault != "silence")
    run = RolloutRun(f"{s3_bucket}/{tmp_path.name}", options(proxy, attempts=6))
    proxy.choose = seeded(0.2, seed=5, faults=quick)
    identity = run.ensure(make_identity())
    made = [store_commit(run, identity, rollout_id(prompt), 12) for prompt in ("00000-aa", "00001-bb")]
    assert run.commits() == made
    assert run_status(run).done
    assert proxy.injected.total() >= 5

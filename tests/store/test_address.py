from __future__ import annotations

import errno
import os
import pickle
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import StorageError
from lrag_ray.store import inside
from lrag_ray.store.address import Storage
from lrag_ray.store.faults import is_beyond_end, is_transient
from lrag_ray.store.s3 import parse_time


def test_files_are_listed_with_sizes_read_moved_and_removed(run_uri: str, tmp_path: Path) -> None:
    storage = Storage(run_uri)
    assert storage.list_files() == {}
    storage.write("a/b/one.txt", b"one")
    storage.write("a/b/one.txt", b"three")
    local = tmp_path / "source.bin"
    local.write_bytes(b"x" * 1000)
    storage.put_file(local, "a/two.bin")
    assert storage.list_files() == {"a/b/one.txt": 5, "a/two.bin": 1000}
    assert storage.list_files("a/b") == {"a/b/one.txt": 5}
    assert storage.list_files("nothing/here") == {}
    assert storage.read_bytes("a/b/one.txt") == b"three"
    assert storage.read_many(["a/b/one.txt", "a/gone.txt"]) == {"a/b/one.txt": b"three"}
    storage.get_file("a/two.bin", tmp_path / "target.bin")
    assert (tmp_path / "target.bin").read_bytes() == b"x" * 1000
    storage.move("a/b/one.txt", "a/moved.txt")
    storage.remove("a/two.bin")
    assert storage.list_files() == {"a/moved.txt": 5}
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/b/one.txt")


def test_no_file_is_read_beyond_the_size_of_its_kind(run_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "_MOST_RECORD_BYTES", 100)
    storage = Storage(run_uri)
    for size in (0, 100):
        storage.write("run.json", b"x" * size)
        assert storage.read_bytes("run.json") == b"x" * size
    storage.write("run.json", b"x" * 101)
    for read in (storage.read_bytes, lambda path: storage.read_many([path, path])):
        with pytest.raises(StorageError, match=r"run\.json has .*100"):
            read("run.json")
    storage.write("latents.safetensors", b"x" * 101)
    assert len(storage.read_bytes("latents.safetensors")) == 101


def test_a_refused_create_reads_no_more_than_it_wanted_to_write(run_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, read = Storage(run_uri), list[tuple[object, object]]()
    cat_file = storage.fs.cat_file

    def measured(path: str, start: int | None = None, end: int | None = None) -> object:
        read.append((start, end))
        return cat_file(path, start=start, end=end)

    for held in (b"", b"x" * 100_000, b"comm"):
        storage.write("commit.json", held)
        with monkeypatch.context() as patched:
            patched.setattr(storage.fs, "cat_file", measured)
            assert not storage.create("commit.json", b"commit")
        assert storage.read_bytes("commit.json") == held
        assert storage.create("commit.json", held)
    assert set(read) == (set() if storage.is_local else {(0, 7)})


def test_an_empty_object_is_empty_in_every_store(run_uri: str) -> None:
    """Real S3 and GCS refuse every range of an object without bytes: status 416."""
    storage = Storage(run_uri)
    storage.write("attempt/empty.safetensors", b"")
    assert storage.read_bytes("attempt/empty.safetensors") == b""
    assert storage.read_range("attempt/empty.safetensors", 0, 10) == b""
    assert storage.digest("attempt/empty.safetensors")[0] == 0
    assert storage.read_many(["attempt/empty.safetensors"] * 2) == {"attempt/empty.safetensors": b""}


@pytest.mark.parametrize("name", ["code", "status", "status_code"])
def test_a_range_beyond_the_end_is_known_by_its_status(name: str) -> None:
    refused = Exception("Request range not satisfiable, 416")
    assert not is_beyond_end(refused)
    setattr(refused, name, 416)
    assert is_beyond_end(refused)
    assert not is_transient(refused)


def test_a_pipe_in_the_place_of_a_commit_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "commit.json")
    assert not Storage(str(tmp_path)).create("commit.json", b"commit")


def test_of_many_concurrent_creates_exactly_one_wins(run_uri: str) -> None:
    storage = Storage(run_uri)
    start = threading.Barrier(8)
    won: list[int] = []

    def create(writer: int) -> None:
        start.wait()
        if storage.create("commit.json", f"writer {writer}".encode()):
            won.append(writer)

    threads = [threading.Thread(target=create, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes("commit.json") == f"writer {won[0]}".encode()
    assert storage.list_files() == {"commit.json": 8}


def test_probe_leaves_nothing_and_sees_that_create_only_is_honoured(run_uri: str) -> None:
    storage = Storage(run_uri)
    assert storage.probe().create_only
    assert storage.list_files() == {}


def test_an_address_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*file/run.*set run.uri"):
        Storage(str(tmp_path / "file" / "run")).probe()


def test_a_missing_bucket_is_named(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/run.*NoSuchBucket.*create it"):
        Storage("s3://no-such-bucket/run").probe()
    with pytest.raises(StorageError, match="NoSuchBucket"):
        Storage("s3://no-such-bucket/run").read_bytes("run.json")
    with pytest.raises(StorageError, match="NoSuchBucket"):
        Storage("s3://no-such-bucket/run").list_files()


def test_an_unknown_scheme_is_refused_without_its_credentials() -> None:
    with pytest.raises(StorageError, match="nosuch") as caught:
        Storage("nosuch://user:hunter2@host/run")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "mistake"), [(" ", "it is empty"), ("runs/a::b", "an address of its own"), ("s3://runs//x", "second '/'")]
)
def test_an_address_that_would_be_taken_for_another_is_refused(uri: str, mistake: str) -> None:
    with pytest.raises(StorageError, match=f"run.uri '{uri}' cannot be opened: .*{mistake}"):
        Storage(uri)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "run"
    in_the_way.touch()
    for uri in (in_the_way, in_the_way / "below"):
        with pytest.raises(StorageError, match="A file is where a folder is to be"):
            Storage(str(uri)).probe()


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_folder_without_hard_links_is_told_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="Commits need hard links"):
        Storage(str(tmp_path)).probe()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a\\b"])
def test_a_recorded_path_cannot_leave_the_run(tmp_path: Path, path: str) -> None:
    with pytest.raises(StorageError, match="not inside the run"):
        Storage(str(tmp_path)).read_bytes(path)


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, Path]:
    """A run whose folders and files are links out of it, and what they lead to."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "rollouts").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.json").write_bytes(b"secret")
    (run / "summary").symlink_to(outside)
    (run / "rollouts/deep").symlink_to("../../outside")
    (run / "commit.json").symlink_to(outside / "secret.json")
    (run / "new.json").symlink_to(outside / "new.json")
    (run / "loop").symlink_to("loop")
    return run, outside


LINKS = ["summary/secret.json", "summary/new/deep.json", "rollouts/deep/secret.json", "commit.json", "new.json"]


@pytest.mark.parametrize("path", LINKS)
@pytest.mark.parametrize("sent", [False, True])
def test_nothing_is_read_or_written_through_a_link_out_of_the_run(
    path: str, sent: bool, linked: tuple[Path, Path], tmp_path: Path
) -> None:
    run, outside = linked
    storage = Storage(str(run))
    if sent:
        storage = pickle.loads(pickle.dumps(storage))
    (run / "own.json").write_bytes(b"own")
    operations = [
        lambda: storage.read_bytes(path),
        lambda: storage.read_many([path]),
        lambda: storage.read_many([path] * 600),
        lambda: storage.get_file(path, tmp_path / "copy"),
        lambda: storage.write(path, b"x"),
        lambda: storage.create(path, b"x"),
        lambda: storage.put_file(run / "own.json", path),
        lambda: storage.move("own.json", path),
        lambda: storage.move(path, "moved.json"),
        lambda: storage.remove(path),
        lambda: storage.list_files(path),
        lambda: storage.below(path),
    ]
    for operation in operations:
        with pytest.raises(StorageError, match=r"is a symbolic link to .*outside.*, which is not inside the run.*Fix:"):
            operation()
    assert {entry.name: entry.read_bytes() for entry in outside.iterdir()} == {"secret.json": b"secret"}
    assert not (tmp_path / "copy").exists()


def test_links_within_a_run_and_a_run_that_is_a_link_are_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "scratch/run", tmp_path / "run"
    (real / "a").mkdir(parents=True)
    link.symlink_to(real)
    (real / "b").symlink_to("a")
    storage = Storage(str(link))
    storage.write("b/file.txt", b"x")
    storage.below("b").write("other.txt", b"y")
    assert storage.read_bytes("a/file.txt") == b"x" and storage.read_bytes("b/other.txt") == b"y"


def test_a_link_to_itself_is_an_error_and_no_traceback(linked: tuple[Path, Path]) -> None:
    storage = Storage(str(linked[0]))
    for operation in (lambda: storage.read_bytes("loop"), lambda: storage.write("loop/file", b"x")):
        with pytest.raises(StorageError, match="loop"):
            operation()


def test_a_storage_that_is_sent_to_another_process_keeps_its_options(run_uri: str) -> None:
    storage = Storage(run_uri, StorageSection(attempts=2, read_timeout_s=7))
    storage.write("a.txt", b"here")
    sent: Storage = pickle.loads(pickle.dumps(storage))
    assert (sent.options, sent.address, sent.read_bytes("a.txt")) == (storage.options, storage.address, b"here")


@pytest.mark.parametrize("endpoint", ["https://me:hunter2@host:9000", "host:9000", "https://host/?token=hunter2"])
def test_an_endpoint_holds_no_credentials(endpoint: str) -> None:
    with pytest.raises(ValueError, match="without credentials") as caught:
        StorageSection(endpoint_url=endpoint)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ["2026-11-21T19:20:21.000Z", "Sat, 21 Nov 2026 19:20:21 GMT"])
def test_times_of_listings_and_headers_are_read(text: str) -> None:
    assert parse_time(text) == datetime(2026, 11, 21, 19, 20, 21, tzinfo=UTC)

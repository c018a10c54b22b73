"""Local folders that refuse: full, read-only, another user's."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from typing_extensions import Buffer

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import StorageError
from lrag_ray.store import retry
from lrag_ray.store.address import Storage
from tests.store.namespaces import run_on_small_disk

FULL = """
import subprocess, sys
from pathlib import Path
from lrag_ray.errors import StorageError
from lrag_ray.store.address import Storage

folder = Path(sys.argv[1])
storage = Storage(str(folder))
storage.write("small.txt", b"fits")
source = folder.parent / "source.bin"
source.write_bytes(bytes(2_000_000))

def refused(operation, *arguments):
    try:
        operation(*arguments)
    except StorageError as error:
        return str(error)
    raise SystemExit("it went through")

for operation, arguments in (
    (storage.write, ("large.bin", bytes(2_000_000))),
    (storage.write, ("small.txt", bytes(2_000_000))),
    (storage.create, ("commit-6.json", bytes(2_000_000))),
    (storage.put_file, (source, "large.bin")),
):
    message = refused(operation, *arguments)
    assert "No space is left there" in message and "lrag-ray gc" in message, message
assert [path.name for path in folder.iterdir()] == ["small.txt"], "leftovers take the space"
assert storage.read_bytes("small.txt") == b"fits"
storage.write("again.txt", b"there is room for this")

subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
message = refused(storage.create, "commit-6.json", b"x")
assert "mounted read-only" in message, message
assert storage.read_bytes("small.txt") == b"fits"
print("done")
"""


def test_a_full_disk_and_a_read_only_one_are_named_and_leave_nothing_half_written(tmp_path: Path) -> None:
    assert run_on_small_disk(FULL, tmp_path / "run", size="1m").strip() == "done"


FOREIGN = """
import os, sys
from lrag_ray.store.address import Storage
from lrag_ray.errors import StorageError
if os.geteuid() == 0:
    os.setuid(65534)
try:
    Storage(sys.argv[1]).write("a.txt", b"x")
except StorageError as error:
    print(error)
"""


def test_a_folder_of_another_user_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=True,
    )
    assert "PermissionError" in done.stdout and "change the owner or the permissions" in done.stdout


def test_a_network_file_system_that_stutters_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ESTALE, as NFS answers after a server's restart, and a link whose answer was lost."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    link = os.link
    answers = [errno.ESTALE, errno.EIO]

    def stuttering(source: object, target: object) -> None:
        link(source, target)  # type: ignore[arg-type]
        if answers:
            raise OSError(answers.pop(0), "made up by the test")

    monkeypatch.setattr(os, "link", stuttering)
    storage = Storage(str(tmp_path), StorageSection(attempts=2))
    assert storage.create("commit-6.json", b"mine")
    assert not storage.create("commit-6.json", b"yours")
    with pytest.raises(StorageError, match="made up by the test"):
        storage.create("commit-12.json", b"mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["commit-12.json", "commit-6.json"]


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.EIO, "look for it in the system's log"), (errno.ENOSPC, "No space is left"), (errno.EDQUOT, "disk quota")],
)
@pytest.mark.parametrize("call", ["os.write", "os.fsync", "os.link", "os.rename"])
def test_a_disk_that_fails_at_any_step_leaves_no_temporary_file_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, advice: str
) -> None:
    """Each system call that a write consists of fails once it has begun; what was there before stays."""
    storage = Storage(str(tmp_path / "run"))
    storage.write("there.json", b"before")
    source = tmp_path / "source.mp4"
    source.write_bytes(b"frames")

    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    class HalfWritten(io.FileIO):
        def write(self, data: Buffer, /) -> int:
            super().write(memoryview(data)[:1])
            raise OSError(code, os.strerror(code))

    if call == "os.write":
        monkeypatch.setattr(Path, "open", lambda path, mode="r": HalfWritten(path, mode.replace("b", "")))
        monkeypatch.setattr(LocalFileSystem, "put_file", lambda *_, **__: fails())
    elif call == "os.rename":
        # What pathlib calls.
        monkeypatch.setattr("pathlib.os.replace", fails)
        monkeypatch.setattr("pathlib.os.rename", fails)
    else:
        monkeypatch.setattr(call, fails)
    operations: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
        "write": (storage.write, ("there.json", b"after")),
        "create": (storage.create, ("commit-6.json", b"mine")),
        "put": (storage.put_file, (source, "video.mp4")),
        "move": (storage.move, ("there.json", "there.json.invalid-0")),
    }
    spared = {"os.write": {"move"}, "os.fsync": {"move"}, "os.link": {"write", "put", "move"}, "os.rename": {"create"}}
    for name, (operation, arguments) in operations.items():
        if name in spared[call]:
            continue
        with pytest.raises(StorageError, match=advice):
            operation(*arguments)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {"there.json": b"before"}

"""Scratch folders on this machine's disk: videos on their way to storage, copies of videos from there, pages to show.

A killed process leaves its folder behind. The next start on the machine removes it, and so does the next worker, so
that a node on which many workers die does not fill its disk.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lrag_ray.store.process import ProcessIdentity, this_process

_PREFIX = "lrag-scratch-"
_OWNER = "owner.json"
_YOUNG_S = 60.0
"""A folder without an owner may be of a process that is about to sign it."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder in the machine's temporary folder (TMPDIR), for the time of the block."""
    remove_orphans()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as made:
        (Path(made) / _OWNER).write_text(this_process().model_dump_json(), encoding="utf-8")
        folder = Path(made) / "files"
        folder.mkdir()
        yield folder


def remove_orphans() -> None:
    """Remove this user's folders whose process has certainly ended, and those that were never signed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.getuid() and stat.S_ISDIR(status.st_mode) and _is_orphan(folder, status.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)


def _is_orphan(folder: Path, modified_s: float) -> bool:
    try:
        return ProcessIdentity.model_validate_json((folder / _OWNER).read_text(encoding="utf-8")).is_gone
    except (FileNotFoundError, ValueError):
        # Its process was killed before it could sign.
        return time.time() - modified_s > _YOUNG_S

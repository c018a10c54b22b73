"""Scratch folders of workers on their node's disk: videos on their way to storage, and copies of videos from there.

A killed worker leaves its folder behind. The next one on the machine removes it, so that a node on which many workers
die does not fill its disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from lrag_ray.store.process import ProcessIdentity, this_process

_PREFIX = "lrag-scratch-"
_OWNER = "owner.json"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder in the machine's temporary folder (TMPDIR), for the time of the block."""
    _remove_orphans(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as made:
        (Path(made) / _OWNER).write_text(this_process().model_dump_json(), encoding="utf-8")
        folder = Path(made) / "files"
        folder.mkdir()
        yield folder


def _remove_orphans(top: Path) -> None:
    """Remove this user's folders whose process has certainly ended."""
    for folder in top.glob(f"{_PREFIX}*"):
        try:
            if folder.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            owner = ProcessIdentity.model_validate_json((folder / _OWNER).read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            # Vanished meanwhile, or not yet signed.
            continue
        if owner.is_gone:
            shutil.rmtree(folder, ignore_errors=True)

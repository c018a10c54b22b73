"""A report that can be given away: one archive with the page, the tables and the videos that they are about."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lrag_ray.errors import UsageError
from lrag_ray.report.build import PAGE, write_report
from lrag_ray.report.collect import ReportData
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import sha256_of
from lrag_ray.store.records import FileRecord, RolloutId

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every member, so that equal contents give equal archives."""
_PACKED = (".mp4", ".webp", ".parquet")
"""Files that are compressed already."""


@dataclass(frozen=True)
class Exported:
    """What an archive holds."""

    file: str
    videos: int
    size_bytes: int
    missing: Sequence[str]
    """Videos that are left out because they cannot be read or are damaged."""


def export_report(
    data: ReportData, file: str | Path, wanted: Callable[[RolloutId], bool], strips: int | None
) -> Exported:
    """Write the report and the videos of the `wanted` rollouts into a new archive.

    The page is ``report.html`` at its top and plays the videos once the archive is unpacked; the other rollouts keep
    their places in the tables and have no player.

    Raises:
        UsageError: `file` exists or cannot be written, or no rollout is wanted.
        StorageError: a run cannot be read.
    """
    target = Path(file)
    if target.exists():
        raise UsageError(f"{file} exists. Fix: give another name, or remove it")
    if not any(map(wanted, data.rollouts)):
        raise UsageError("no video fits. `lrag-ray videos RUN` lists what there is")
    missing: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
            members = Path(folder, "members")
            videos = write_members(data, members, wanted, strips, missing)
            packed = Path(folder, "packed.zip")
            _pack(members, packed)
            # Created once: another export under this name must not be replaced.
            os.link(packed, target)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}. Fix: give another place") from error
    return Exported(str(file), videos, target.stat().st_size, missing)


def write_members(
    data: ReportData, folder: Path, wanted: Callable[[RolloutId], bool], strips: int | None, missing: list[str]
) -> int:
    """Write the report and the videos of the `wanted` rollouts into a folder that plays anywhere; returns their number.

    `missing` gets the videos that are left out.
    """
    copies = _copied(data, folder, wanted, missing)
    write_report(data, to=str(folder), strips=strips, link=lambda *place: copies.get(place))
    return len(copies)


def _copied(
    data: ReportData, folder: Path, wanted: Callable[[RolloutId], bool], missing: list[str]
) -> dict[tuple[Storage, str], str]:
    """URLs below `folder` of the videos that were copied into it, by where they come from."""
    runs: dict[Storage, str] = {}
    copies = {}
    for rollout, shown in data.rollouts.items():
        storage = shown.run_dir.storage
        run = runs.setdefault(storage, f"videos/{len(runs) + 1}")
        for video in shown.videos if wanted(rollout) else ():
            name = f"{run}/{rollout.backbone}/{rollout.method}/{rollout.prompt_id}-{rollout.sample}"
            path = f"{name}-{video.commit.latent_frames}.mp4"
            if (storage, video.video.path) not in copies and _copy(storage, video.video, folder / path, missing):
                copies[storage, video.video.path] = quote(path)
    return copies


def _copy(storage: Storage, file: FileRecord, target: Path, missing: list[str]) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage.get_file(file.path, target)
    except FileNotFoundError:
        missing.append(f"{storage.uri}/{file.path} is missing")
        return False
    if sha256_of(target) != file.sha256:
        target.unlink()
        missing.append(f"{storage.uri}/{file.path} does not have the recorded checksum")
        return False
    return True


def _pack(folder: Path, target: Path) -> None:
    """Every file below `folder`, the page first."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(filter(Path.is_file, folder.rglob("*")), key=lambda path: (path.name != PAGE, path)):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            info.compress_type = zipfile.ZIP_STORED if path.suffix in _PACKED else zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member, path.open("rb") as content:
                while chunk := content.read(1 << 20):
                    member.write(chunk)

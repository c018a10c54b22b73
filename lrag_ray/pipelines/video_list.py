"""Which videos to score: a folder, a file, a glob or a bucket, and what a manifest says of them.

Names are only ever shown and hashed, never taken apart: what belongs together comes from the manifest.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lrag_ray.config.redaction import redact
from lrag_ray.config.schema import StorageSection
from lrag_ray.config.table_file import read_table
from lrag_ray.errors import UsageError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import sha256_of
from lrag_ray.thread_pool import thread_pool
from lrag_ray.video.reader import SUFFIXES
from lrag_ray.wan.file_kinds import absence

_MOST_PATHS = 500_000
"""Links between folders can lead to the same ones along endless ways."""
_MOST_DEPTH = 100
COLUMNS = ("path", "method", "backbone", "prompt", "sample", "duration_s")
"""Of a manifest; all but the first may be absent."""


@dataclass(frozen=True)
class Labels:
    """What a manifest says of a video."""

    method: str = ""
    backbone: str = ""
    prompt: str = ""
    sample: int = 0


@dataclass(frozen=True)
class ListedVideo:
    """A video to score."""

    name: str
    """Path relative to the folder; with `stamp` the identity under which its rows are filed."""
    path: str
    """Where workers open it: on this machine, or in the listing's storage."""
    stamp: str
    """What changes with the content: SHA-256 of a local file; size and time of an object; empty if unavailable."""
    labels: Labels = Labels()
    durations_s: tuple[float, ...] = ()
    """Under which lengths it counts, ascending; the last one is the whole file."""
    problem: str = "there is no such file"
    """Why there is no stamp."""


@dataclass(frozen=True)
class VideoList:
    """What was found."""

    storage: Storage | None
    """Where the videos are, or None for this machine's files."""
    videos: Sequence[ListedVideo]
    notes: Sequence[str] = ()
    """What a person should know."""


def list_videos(target: str, manifest: str | None, options: StorageSection) -> VideoList:
    """Find and stamp the videos of `target`, those of `manifest` alone where one is given.

    Raises:
        UsageError: nothing is there, or the manifest cannot be used.
        StorageError: a bucket cannot be listed.
    """
    notes: list[str] = []
    if "://" in target:
        storage, found = _in_bucket(target, notes, options, every_file=manifest is not None)
    else:
        storage, found = None, _on_disk(target, notes, every_file=manifest is not None)
    if manifest is not None:
        rows, unused = _read_manifest(Path(manifest))
        if not rows:
            raise UsageError(
                f"{manifest}: the manifest has no rows. Fix: name one video a row, or leave out --manifest"
            )
        if unused:
            notes.append(f"{manifest}: not used: {', '.join(unused)}; known columns are {', '.join(COLUMNS)}")
        found = _labelled(rows, found)
    if not found:
        raise UsageError(
            "\n  ".join(
                [
                    f"no videos at {redact(target)!r}, and no run. Give the address of a run, a glob, or a folder with "
                    f"files of these suffixes: {', '.join(sorted(SUFFIXES))}",
                    *notes,
                ]
            )
        )
    if storage is None:
        with thread_pool(4, "videos") as pool:
            found = list(pool.map(_stamped, found))
    return VideoList(storage, found, notes)


def _on_disk(target: str, notes: list[str], *, every_file: bool) -> list[ListedVideo]:
    place = Path(target).expanduser()
    if place.is_dir():
        base = place
        found = list(_bounded(_below(place, notes), target))
        chooses = not every_file
    elif place.exists():
        base, found, chooses = place.parent, [place], False
    else:
        base = Path(*_before_magic(place.parts))
        rest = list(place.parts[len(base.parts) :])
        if rest and rest[-1] == "**":
            # By itself it stands for folders alone.
            rest.append("*")
        # Unlike glob.glob, this does not follow links to folders, which may lead round in circles, below a **.
        matches = base.glob(str(Path(*rest))) if rest else ()
        wanted = any(part.startswith(".") for part in rest)
        found = [path for path in _bounded(matches, target) if wanted or not _is_hidden(path.relative_to(base))]
        chooses = place.name.endswith("*")
    if chooses:
        _note_skipped((PurePosixPath(path.relative_to(base)) for path in found if not _is_folder(path)), target, notes)
        found = [path for path in found if _is_video(path.relative_to(base))]
    # What is neither file nor folder, a link to nothing say, is a video that is not available, which is reported.
    files = sorted({path.absolute() for path in found if not _is_folder(path)})
    base = base.absolute()
    return [ListedVideo(_shown(path.relative_to(base)), str(path), "") for path in files]


def _stamped(video: ListedVideo) -> ListedVideo:
    """A video on this machine with its checksum, or with what keeps it from having one."""
    if not video.path:
        return video
    path = Path(video.path)
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return replace(video, stamp=sha256_of(path))
        # Not opened: a pipe would wait for who writes into it.
        return replace(video, problem="it is not a file, but a pipe, a socket or a device")
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ELOOP)
        return replace(video, problem=f"it is {absence(path)}" if gone else f"it cannot be read: {error.strerror}")


def _bounded(paths: Iterable[Path], target: str) -> Iterator[Path]:
    """The same paths; UsageError where there are more than `_MOST_PATHS`."""
    for count, path in enumerate(paths):
        if count == _MOST_PATHS:
            raise UsageError(
                f"{target} leads to more than {_MOST_PATHS:,} files and folders. Fix: score a part of it, and look for "
                "links between its folders"
            )
        yield path


def _below(folder: Path, notes: list[str], above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files in a folder to any sensible depth. Links to folders are followed, but not back to one that is being listed.

    A folder comes before what is in it. One that may not be listed, such as lost+found of a mounted disk, goes to
    `notes`.
    """
    yield folder
    real = folder.resolve()
    if real in above:
        return
    if len(above) == _MOST_DEPTH:
        notes.append(f"{_shown(folder)}: not looked into: {_MOST_DEPTH} folders deep")
        return
    try:
        entries = sorted(folder.iterdir())
    except PermissionError as error:
        notes.append(f"{_shown(folder)}: not looked into: {error.strerror}")
        return
    for entry in entries:
        if _is_folder(entry):
            yield from _below(entry, notes, above | {real})
        else:
            yield entry


def _in_bucket(
    target: str, notes: list[str], options: StorageSection, *, every_file: bool
) -> tuple[Storage, list[ListedVideo]]:
    scheme, _, rest = target.partition("://")
    parts = rest.rstrip("/").split("/")
    base = _before_magic(parts)
    if base == parts and _is_video(PurePosixPath(parts[-1])):
        base = parts[:-1]
    pattern = "/".join(parts[len(base) :])
    storage = Storage(f"{scheme}://{'/'.join(base)}", options)
    listed = storage.list_details()
    if not pattern and not every_file:
        _note_skipped(map(PurePosixPath, listed), target, notes)
    found = []
    for path, details in sorted(listed.items()):
        if fnmatch.fnmatchcase(path, pattern) if pattern else every_file or _is_video(PurePosixPath(path)):
            found.append(ListedVideo(path, path, f"{details.size_bytes}-{details.modified_s or 0:.0f}"))
    return storage, found


def _note_skipped(paths: Iterable[PurePosixPath], target: str, notes: list[str]) -> None:
    """Say which of the paths are not named like videos; hidden files go without saying."""
    others = Counter(path.suffix.lower() or "no suffix" for path in paths if not _is_hidden(path) | _is_video(path))
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(
            f"{redact(target)}: skipped {counted(others.total(), 'file')} that are not named like videos: "
            f"{kinds}. A glob or a "
            "manifest may name them"
        )


def _before_magic(parts: Sequence[str]) -> list[str]:
    """Leading path components without wildcards."""
    return list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))


def _is_video(path: PurePosixPath | Path) -> bool:
    """Whether a file of a folder is taken for a video, by its suffix in any case; globs and manifests name any file."""
    return not _is_hidden(path) and path.suffix.lower() in SUFFIXES


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        # A folder that may be listed and not entered: that its files cannot be read is reported with them.
        return False


def _is_hidden(path: PurePosixPath | Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _shown(path: Path) -> str:
    """A file name may be any bytes; rows and tables are UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _labelled(rows: Iterable[tuple[str, Mapping[str, Any]]], found: Sequence[ListedVideo]) -> list[ListedVideo]:
    """The videos that a manifest names, in its order, with what it says of them."""
    by_name = {video.name: video for video in found}
    made: dict[str, ListedVideo] = {}
    for place, row in rows:
        name, labels, duration_s = _read_row(place, row)
        video = made.get(name) or replace(by_name.get(name, ListedVideo(name, "", "")), labels=labels)
        if video.labels != labels:
            raise UsageError(f"{place}: {name!r} stands in the manifest twice, as {video.labels} and as {labels}")
        if duration_s is not None:
            video = replace(video, durations_s=tuple(sorted({*video.durations_s, duration_s})))
        made[name] = video
    return list(made.values())


def _read_row(place: str, row: Mapping[str, Any]) -> tuple[str, Labels, float | None]:
    texts: dict[str, str] = {}
    for key in COLUMNS:
        value = row.get(key)
        if isinstance(value, bool | list | dict):
            raise UsageError(f"{place}: {key} must be text or a number, not {json.dumps(value)[:60]}")
        if value not in (None, ""):
            # Line breaks around a prompt may tell it from another one.
            texts[key] = str(value).strip(" \t" if key == "prompt" else None)
    name = PurePosixPath(texts.get("path", "")).as_posix()
    if name == "." or name.startswith("/") or ".." in name.split("/"):
        raise UsageError(f"{place}: path {texts.get('path', '')!r} must be a path inside the folder that is scored")
    try:
        sample = int(texts.get("sample", "0"))
        duration_s = float(texts["duration_s"]) if "duration_s" in texts else None
    except ValueError as error:
        raise UsageError(f"{place}: {error}; sample is a whole number and duration_s a number of seconds") from None
    if duration_s is not None and not 0 < duration_s < 1e6:
        raise UsageError(f"{place}: duration_s {duration_s:g} must be above 0")
    labels = Labels(texts.get("method", ""), texts.get("backbone", ""), texts.get("prompt", ""), sample)
    return name, labels, duration_s


def _read_manifest(path: Path) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """Rows with their places, and the columns that mean nothing here."""
    table = read_table(path, "path", "the manifest", UsageError)
    unused = [column for column in table.columns if column not in COLUMNS]
    return [(f"{path}:{row.line}", row.cells) for row in table.rows], unused

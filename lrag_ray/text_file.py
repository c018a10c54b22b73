"""Text files that a user hands over: opened, limited in size and decoded in one place.

What is not a readable text file is reported as the caller's error with the path, the place and the fix.
"""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from lrag_ray.errors import LragError

MOST_BYTES = 256 << 20
"""Largest file, unless the caller sets a lower limit."""
MOST_LINES = 4_000_000
"""More are refused before anybody takes them one by one; a pool of captions has one or two million."""
MOST_CONFIG_BYTES = 1 << 24
"""Largest JSON file beside weights."""
MOST_VALUE_BYTES = 1 << 30
"""Memory that the values of a JSON text may take: a million prompts need half of it."""
_SMALL_CHARACTERS = 1 << 20

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # The mark of UTF-32 begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_START_CHARACTERS = 512
_OTHER_KINDS = {
    "version https://git-lfs": "a Git LFS pointer, not the file. Fix: `git lfs pull` where it was cloned",
    "<!doctype html": "a web page, perhaps an error or login page of its source. Fix: fetch it again",
    "<html": "a web page, perhaps an error or login page of its source. Fix: fetch it again",
}
"""What downloads leave in place of a file, by its first characters."""


def read_text(
    path: str | Path, what: str, error: type[LragError], *, most_bytes: int = MOST_BYTES, missing: str = ""
) -> str:
    """Content of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; line ends stay what they are.

    `what` names the file's role ("the manifest"); `missing` is the message where it does not exist.

    Raises:
        error: missing, unreadable, not a regular file, too large, too many lines, not text, a web page or Git
            LFS pointer instead.
    """
    data = _read_bytes(path, what, error, most_bytes, missing)
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    if not mark and data[:4].count(0) == 2:
        raise error(f"{path}: {what} looks like UTF-16 without a byte order mark. Fix: save the file as UTF-8")
    body = data[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as fault:
        offset = len(mark) + fault.start
        line = body[: fault.start].decode(encoding, "replace").count("\n") + 1
        name = encoding[:6].upper().rstrip("-")
        raise error(
            f"{path}:{line}: byte 0x{data[offset]:02x} at offset {offset} is not {name}; save the file as UTF-8"
        ) from None
    if (lines := text.count("\n")) > MOST_LINES:
        raise error(
            f"{path}: {what} has {lines:,} lines, and at most {MOST_LINES:,} are read. Fix: give a part of it "
            "(`split -l 1000000 FILE` makes parts)"
        )
    start = text[:_START_CHARACTERS].lstrip().lower()
    for beginning, kind in _OTHER_KINDS.items():
        if start.startswith(beginning):
            raise error(f"{path}: {what} is {kind}")
    if "\0" in text:
        before = text[: text.index("\0")]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise error(f"{path}:{line}: control character U+0000 at column {column}; {what} is a plain text file")
    return text


def is_json_bomb(text: str | bytes) -> bool:
    """Whether the values of a JSON text would take more than `MOST_VALUE_BYTES`, counted before any is made."""

    def count(character: str) -> int:
        return text.count(character) if isinstance(text, str) else text.count(character.encode())

    if len(text) <= _SMALL_CHARACTERS:
        return False
    # Three characters make an empty list of 72 bytes.
    return 40 * count(",") + 72 * count("[") + 240 * count("{") + len(text) > MOST_VALUE_BYTES


def _read_bytes(path: str | Path, what: str, error: type[LragError], most_bytes: int, missing: str) -> bytes:
    try:
        # Non-blocking, because opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
            mode, size = (found := os.fstat(descriptor)).st_mode, found.st_size
            if stat.S_ISDIR(mode):
                raise error(f"{path}: cannot read {what}: Is a directory")
            if not stat.S_ISREG(mode):
                raise error(
                    f"{path}: cannot read {what}: a pipe, a socket or a device, not a file. Fix: write its content "
                    "into a file and give that"
                )
            data = file.read(most_bytes + 1) if size <= most_bytes else b""
    except FileNotFoundError as fault:
        raise error(f"{path}: {missing or f'cannot read {what}: {fault.strerror}'}") from None
    except OSError as fault:
        raise error(f"{path}: cannot read {what}: {fault.strerror}") from None
    except ValueError:
        raise error(f"{str(path)!r} cannot be the path of {what}: it contains a NUL or a lone surrogate") from None
    if max(size, len(data)) > most_bytes:
        raise error(f"{path}: {what} is larger than {most_bytes:,} bytes. Fix: correct the path, or split the file")
    return data

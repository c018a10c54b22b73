"""What lies where weights should be: the usual mix-ups of downloads, told from the first bytes of a file."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

HEAD_BYTES = 512
"""How much of a file `no_weights` wants to see."""
_SHOWN = 60


def absence(path: Path) -> str:
    """How a path that `Path.exists` denies is not there: links that lead nowhere are told apart."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a symbolic link that leads to itself"
    if path.is_symlink():
        return f"a symbolic link to {path.readlink()}, which is not there"
    return "not there"


def is_zip(head: bytes) -> bool:
    """Whether a file begins like a zip archive, as torch has written since 1.6."""
    return head.startswith(b"PK")


def is_pickle(head: bytes) -> bool:
    """Whether a file begins like a pickle, as older torch wrote."""
    return head.startswith(b"\x80")


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with the byte length of a JSON header and the header's brace."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (header_bytes,) = struct.unpack("<Q", head[:8])
    return bool(2 <= header_bytes <= max(size, 1 << 27))


def no_weights(head: bytes, suffix: str) -> str | None:
    """What a file is instead of weights, with the mend; None for one that could hold weights."""
    if not head:
        return "is empty (0 bytes). Mend: fetch it again"
    if pointer := re.match(rb"version https://git-lfs\S*\s+oid \S+\s+size (\d+)", head):
        return (
            f"is a Git LFS pointer to a file of {int(pointer[1]):,} bytes, not the file. Mend: `git lfs pull` where it "
            "was cloned, or fetch the file itself"
        )
    if head.startswith(b"\x1f\x8b"):
        return "is a gzip archive. Mend: unpack it and give the file inside"
    if is_zip(head) or is_pickle(head):
        return None
    text = _as_text(head)
    if text is None and suffix == ".safetensors":
        return "is named .safetensors, but its header is damaged or that of no such file. " + _AGAIN
    if text is None:
        return "is no torch file and no safetensors file, or its beginning is damaged. " + _AGAIN
    if text.startswith("<"):
        return f"is a web page ({_shown(text)}), perhaps an error or login page of its source. " + _AGAIN
    if '"weight_map"' in text or '"total_size"' in text:
        return (
            "is the index of weights that are split over several files. Mend: give one file that holds them all "
            "(the published checkpoints are single files)"
        )
    return f"is text ({_shown(text)}), no torch file. " + _AGAIN


_AGAIN = "Mend: fetch it again and compare its size with the source"


def _as_text(head: bytes) -> str | None:
    """The beginning of a file as text, or None where it holds other bytes than text does."""
    # The cut may go through the middle of a character.
    text = head.decode("utf-8", errors="replace").rstrip("\ufffd").strip()
    readable = all(character.isprintable() or character.isspace() for character in text)
    return text if text and readable and "\ufffd" not in text else None


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return f"it begins with '{line[:_SHOWN]}'"

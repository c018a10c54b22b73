"""What is stored where weights should be: the usual mix-ups, recognised by the first bytes of a file."""

from __future__ import annotations

import errno
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, cast

from lrag_ray.wan.tensor_file import NotTensorsError, refuse_long_header

HEAD_BYTES = 512
"""How much of a file `no_weights` wants to see."""
_SHOWN = 60
_MOST_DIRECTORY_BYTES = 1 << 23
"""Of an archive: 100,000 entries, and two seconds to read them."""


def absence(path: Path) -> str:
    """How a path that `Path.exists` denies is not there: links that lead nowhere are reported apart."""
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


_UNPACK = "Fix: unpack it and give the weights file inside"
_CONVERTED = "Fix: give the same weights as .safetensors or .pt, in bfloat16 or float32"
_KINDS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GGUF", f"is a GGUF file (weights quantised for llama.cpp and ComfyUI). {_CONVERTED}"),
    (0, b"\x1f\x8b", f"is a gzip archive. {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"is a 7z archive. {_UNPACK}"),
    (0, b"Rar!\x1a\x07", f"is a RAR archive. {_UNPACK}"),
    (0, b"\xfd7zXZ\x00", f"is an xz archive. {_UNPACK}"),
    (0, b"BZh", f"is a bzip2 archive. {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"is a zstd archive. {_UNPACK}"),
    (257, b"ustar", f"is a tar archive. {_UNPACK}"),
    (0, b"\x93NUMPY", f"is a NumPy array. {_CONVERTED}"),
    (0, b"\x89HDF\r\n", f"is an HDF5 file, as Keras writes. {_CONVERTED}"),
    (4, b"ftyp", "is an MP4 or MOV video. Fix: correct the path"),
    (0, b"\x1a\x45\xdf\xa3", "is a Matroska or WebM video. Fix: correct the path"),
    (0, b"\x89PNG", "is a PNG image. Fix: correct the path"),
    (0, b"\xff\xd8\xff", "is a JPEG image. Fix: correct the path"),
    (0, b"%PDF", "is a PDF document. Fix: correct the path"),
    (0, b"PAR1", "is a Parquet table. Fix: correct the path"),
)
"""Offset and first bytes of files of other kinds, what they are, and the fix."""
_ONNX = re.compile(rb"\x08[\x01-\x20](?:\x12[\x01-\x40][ -~]+[\x1a\x22\x28\x32\x3a\x42]|\x3a..?.?.?\x0a)", re.DOTALL)
"""Protocol buffers: the version of the format, then who wrote it or the graph."""
_INSIDE = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")


def no_weights(head: bytes, suffix: str) -> str | None:
    """What a file is instead of weights, with the fix; None for one that could hold weights."""
    if not head:
        return "is empty (0 bytes). Fix: fetch it again"
    if pointer := re.match(rb"version https://git-lfs\S*\s+oid \S+\s+size (\d+)", head):
        return (
            f"is a Git LFS pointer to a file of {int(pointer[1]):,} bytes, not the file. Fix: `git lfs pull` where it "
            "was cloned, or fetch the file itself"
        )
    for offset, magic, what in _KINDS:
        if head[offset:].startswith(magic):
            return what
    if is_zip(head) or is_pickle(head):
        return None
    if _ONNX.match(head):
        return f"is an ONNX model. {_CONVERTED}"
    text = _as_text(head)
    if text is None and suffix == ".safetensors":
        return f"is named .safetensors, but does not begin as such a file does. {_COMPARE}"
    if text is None:
        return f"is neither a torch file nor a safetensors file, or its beginning is damaged. {_COMPARE}"
    if text.startswith("<"):
        return f"is a web page ({_shown(text)}), perhaps an error or login page of its source. Fix: fetch it again"
    if '"weight_map"' in text or '"total_size"' in text:
        return (
            "is the index of weights that are split over several files. Fix: put it and its parts in a folder and give "
            "that folder"
        )
    return f"is text ({_shown(text)}), not a torch or safetensors file. Fix: correct the path"


def refuse_odd_files(folder: Path) -> None:
    """ValueError for what no library may open because it has the name of a file that belongs in a model's folder.

    Opening a pipe would wait for its writer for ever, a device or a file of gigabytes fill the memory.
    """
    for file in sorted(folder.iterdir()):
        if not file.exists() or file.is_dir():
            continue
        if not file.is_file():
            raise ValueError(f"{file.name} is a pipe, a socket or a device")
        if file.suffix in _READ_WHOLE and (size := file.stat().st_size) > _MOST_READ_WHOLE:
            raise ValueError(f"{file.name} has {size:,} bytes, and such files at most {_MOST_READ_WHOLE:,}")
        if file.suffix == ".safetensors":
            try:
                refuse_long_header(file)
            except NotTensorsError as error:
                raise ValueError(f"{file.name}: {error}") from error


class BoundedFile:
    """What `zipfile` and `tarfile` read from: no part of an archive takes much memory at once.

    `most_bytes` begins as the limit of a zip's directory, which is read when the archive is opened. `left` limits what
    is read in all until it is set again; None does not. `error` above either.
    """

    left: int | None = None

    def __init__(
        self,
        file: BinaryIO,
        error: type[Exception] = zipfile.BadZipFile,
        most_bytes: int = _MOST_DIRECTORY_BYTES,
    ) -> None:
        self._file = file
        self._error = error
        self.most_bytes = most_bytes
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        if size > self.most_bytes:
            raise self._error(f"it says that one of its parts has {size:,} bytes")
        data = self._file.read(self.most_bytes if size < 0 else size)
        if self.left is not None:
            self.left -= len(data)
            if self.left < 0:
                raise self._error("one of its headers does not end")
        return data


def foreign_zip(path: Path) -> str | None:
    """What a zip archive is that torch did not write, with the fix; None for torch's own and for damaged ones."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(cast(BinaryIO, BoundedFile(file))) as archive:
            names = [entry.filename for entry in archive.infolist()[:_MOST_ENTRIES] if not entry.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    if any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return f"is a NumPy archive (.npz) of {len(names)} arrays. {_CONVERTED}"
    inside = next((name for name in names if name.lower().endswith(_INSIDE)), None)
    shown = inside or ", ".join(names[:3]) or "nothing"
    return f"is a zip archive that torch did not write; it holds {shown[:_SHOWN]}. {_UNPACK if names else _COMPARE}"


_COMPARE = "Fix: give a .pt, .pth or .safetensors file; if this was one, compare its size and digest with the source"
_MOST_ENTRIES = 100_000
_READ_WHOLE = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the files beside weights that libraries read as a whole."""
_MOST_READ_WHOLE = 1 << 26
"""The vocabulary of umT5 has 17 MB."""


def _as_text(head: bytes) -> str | None:
    """The beginning of a file as text, or None where it holds other bytes than text does."""
    # The cut may go through the middle of a character.
    text = head.decode("utf-8", errors="replace").rstrip("\ufffd").strip()
    readable = all(character.isprintable() or character.isspace() for character in text)
    return text if text and readable and "\ufffd" not in text else None


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return f"it begins with '{line[:_SHOWN]}'"

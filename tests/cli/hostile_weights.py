"""Weight files of strangers, to be put into every slot of a configuration.

Example, which writes them all into a folder::

    python -m tests.cli.hostile_weights FOLDER
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from tests.wan.torch_files import older, text, zipped

MARKER = "acted"
"""What the attacks that act would make in the working directory."""
_ACT = b"\x80\x02cos\nsystem\n" + text(f"touch {MARKER}") + b"\x85R."
_MEMBERS = 30_000


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _safetensors(header: object, values: int = 16, length: int | None = None) -> bytes:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written) if length is None else length) + written + bytes(values)


def _broken_members(scattered: bool) -> bytes:
    """A torch archive of 30,000 tensors whose records are not where its directory says."""
    keys = [str(at) for at in range(_MEMBERS)]
    storages = (
        text(key)
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + b"K\x01tQK\x00K\x01\x85K\x01\x85\x89NtRs"
        for key in keys
    )
    whole = bytearray(zipped(b"\x80\x02}" + b"".join(storages) + b".", **{f"data/{key}": bytes(4) for key in keys}))
    if scattered:
        return bytes(whole)
    # Of the last one alone, so that all others are read first.
    last = whole.rindex(b"PK\x03\x04")
    whole[last] = 0
    return bytes(whole)


def _header(entry: dict[str, object]) -> dict[str, object]:
    return {"decoder.head.2.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | entry}


FILES: dict[str, Callable[[], bytes]] = {
    "pickle in an archive": lambda: zipped(_ACT),
    "pickle in the older form": lambda: older(_ACT),
    "bare pickle": lambda: _ACT,
    "TorchScript with loading code": lambda: zipped(
        b"\x80\x02}.", **{"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"def __setstate__(self): pass"}
    ),
    "expanded tensor": lambda: _saved({"decoder.head.2.weight": torch.zeros(1).expand(40_000, 40_000)}),
    "one storage many times": lambda: _saved({str(at): torch.zeros(1000).view(1000) for at in range(200)}),
    "truncated archive": lambda: _saved({"a": torch.zeros(1000)})[:-300],
    "truncated pickle": lambda: older(_ACT)[:60],
    "bomb of a pickle": lambda: _archive(
        {"archive/data.pkl": b"\x80\x02" + b"]" * (60 << 20) + b"."}, zipfile.ZIP_DEFLATED
    ),
    "bomb of records": lambda: _archive({f"archive/data/{at}": b"" for at in range(_MEMBERS)}),
    "broken record at the end": lambda: _broken_members(False),
    "30,000 tensors": lambda: _broken_members(True),
    "directory that lies": lambda: _saved({"a": torch.zeros(4)}).replace(
        b"PK\x05\x06" + bytes(6), b"PK\x05\x06" + b"\xff" * 6
    ),
    "huge shape": lambda: _safetensors(_header({"shape": [1 << 40, 1 << 40]})),
    "shape beyond its bytes": lambda: _safetensors(_header({"shape": [1 << 20]})),
    "negative shape": lambda: _safetensors(_header({"shape": [-4]})),
    "overlapping offsets": lambda: _safetensors(
        {str(at): {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for at in range(4)}
    ),
    "header longer than the file": lambda: _safetensors({}, length=1 << 60),
    "header of 100 MB that is not there": lambda: _safetensors({}, length=100_000_000),
    "header shorter than it is": lambda: _safetensors(_header({}), length=9),
    "header of nesting": lambda: _safetensors(b'{"a":' * 20_000),
    "many names": lambda: _safetensors(
        {f"{at:06}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for at in range(100_000)}, 0
    ),
    "names that act on a terminal": lambda: save({"\x1b[2J\x1b]0;owned\x07NaN": torch.zeros(2)}),
    "names that are not text": lambda: _safetensors(b'{"\xff\xfe":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    "names of NaN": lambda: _safetensors(b'{NaN:{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "a long name": lambda: save({"x" * 1_000_000: torch.zeros(2)}),
    "values that are NaN": lambda: save({"decoder.head.2.weight": torch.full((4,), float("nan"))}),
    "empty": lambda: b"",
    "no tensors": lambda: save({}),
}
"""Content by kind."""


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _itself(path: Path) -> None:
    path.symlink_to(path.name)


def _nowhere(path: Path) -> None:
    path.symlink_to("../../../nowhere")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000) + b"{")
        file.truncate(1 << 40)


def _sparse_archive(path: Path) -> None:
    """An archive whose directory takes 4 GB."""
    size = (1 << 32) - (1 << 16)
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(size)
        file.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 60_000, 60_000, size - 4, 4, 0))


def _folder(path: Path) -> None:
    path.mkdir()
    _pipe(path / "model.safetensors")
    _pipe(path / "config.json")


PLACES: dict[str, Callable[[Path], None]] = {
    "pipe": _pipe,
    "device": _endless,
    "link to itself": _itself,
    "link to nothing": _nowhere,
    "sparse file": _sparse,
    "sparse archive": _sparse_archive,
    "folder of pipes": _folder,
}
"""What is not an ordinary file."""
ATTACKS = (*FILES, *PLACES)


def make(attack: str, path: Path) -> None:
    """Put one of `ATTACKS` at `path`, where nothing is."""
    if attack in FILES:
        path.write_bytes(FILES[attack]())
    else:
        PLACES[attack](path)


if __name__ == "__main__":
    for name in ATTACKS:
        make(name, Path(sys.argv[1]) / name.replace(" ", "_"))

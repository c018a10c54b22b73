"""Files in torch's formats with pickles of our own."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def zipped(data: bytes, **records: bytes) -> bytes:
    """A torch archive with a pickle of our own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def older(data: bytes, **_: bytes) -> bytes:
    """The same in the format of before torch 1.6."""
    begin = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, MACHINE))
    return begin + data + pickle.dumps([], 2)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()

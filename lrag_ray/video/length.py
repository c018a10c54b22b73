"""What a video file says of its own length, read from its structure alone.

Most containers declare how many bytes or seconds they hold, which tells half a download from a whole file exactly and
without decoding. Declared frame counts do not: edit lists, variable frame rates and dropped frames make them differ
from what is shown in intact files too.

mp4, mov     the boxes; what they say of samples is checked by the caller, from FFmpeg's index. Fragmented files end
             with a table of their fragments (mfra), list them in front (sidx), or declare a duration (mehd).
mkv, webm    the size of the segment, else its duration
avi          the size of each RIFF chunk
flv          file size or duration in onMetaData, and whole tags
asf, wmv     the file size in the header
ivf          the duration in the header, and whole frames
mxf          where the footer is
"""

from __future__ import annotations

import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

_HEAD_BYTES = 1 << 16
"""How much of a file may come before what its header says of its length."""
_RIFF_SLACK = 8
"""Some writers count the header of a RIFF chunk twice."""


class DeclaredLength(NamedTuple):
    """The length of a whole file. Without either value the file declares none."""

    size_bytes: int | None = None
    """The file has at least so many bytes."""
    duration_s: float | None = None
    """The last packet ends about here; known only where the number of bytes is not."""


class OverdeclaredError(ValueError):
    """A header promises more than any file of this size can hold."""


def declared_length(path: Path) -> tuple[str, DeclaredLength]:
    """FFmpeg's name of the container that the file seems to be, and what it declares. FFmpeg may know it better.

    Raises:
        OverdeclaredError: its index would take memory out of all proportion to the file.
    """
    with path.open("rb") as file:
        head = file.read(16)
        container, read = next((found for magic, found in _MAGIC if re.match(magic, head, re.DOTALL)))
        file.seek(0)
        with suppress(struct.error, zlib.error, IndexError):
            return container, read(file, os.fstat(file.fileno()).st_size)
    return container, DeclaredLength()


class _Box(NamedTuple):
    kind: bytes
    start: int
    """Of its content."""
    end: int


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[_Box]:
    """ISO base media boxes between two positions; the last one may promise to end later."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
            content += 8
        stop = start + size if size else end
        if stop < content:
            return
        yield _Box(kind, content, stop)
        start = stop


_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}
"""Boxes that count samples, and where after their kind they do."""
_COUNT = re.compile(b"|".join(_COUNTS))
_SAMPLES_PER_BYTE = 2
"""FFmpeg takes 24 bytes for a sample. Old audio codecs count up to 6 per byte, but have pictures beside them."""
_MOST_SEARCHED = 1 << 26
"""Bytes of a box that is not known to hold an index."""


class _Mp4Header:
    """What the boxes below moov and moof say. They are found by name: FFmpeg accepts them in the oddest places."""

    def __init__(self, size: int) -> None:
        self._limit = size * _SAMPLES_PER_BYTE
        self._samples = 0
        self.fragmented = False
        self.duration_s: float | None = None
        """Of all fragments; None where it is not declared."""

    def read(self, content: bytes) -> None:
        """Take in the content of a box."""
        for found in _COUNT.finditer(content):
            at = found.end() + _COUNTS[found.group()]
            self._samples += int.from_bytes(content[at : at + 4])
        if self._samples > self._limit:
            raise OverdeclaredError(f"it declares {self._samples} samples, more than the file can hold")
        self.fragmented |= b"mvex" in content
        movie, extended = _after(content, b"mvhd"), _after(content, b"mehd")
        if movie and extended:
            (timescale,) = struct.unpack_from(">I", movie, 20 if movie[0] else 12)
            (duration,) = struct.unpack_from(">Q" if extended[0] else ">I", extended, 4)
            self.duration_s = _positive(duration / timescale) if timescale else None
        if compressed := _after(content, b"cmvd"):
            if int.from_bytes(compressed[:4]) > self._limit:
                raise OverdeclaredError("its compressed header claims to be larger than the file")
            start = content.index(b"cmvd") + 8
            self.read(zlib.decompressobj().decompress(content[start:], self._limit))


def _after(content: bytes, kind: bytes) -> bytes:
    """The first bytes of the first box of a kind; empty where there is none."""
    at = content.find(kind)
    return content[at + 4 : at + 36] if at >= 0 else b""


def _mp4(file: BinaryIO, size: int) -> DeclaredLength:
    header = _Mp4Header(size)
    end = listed_end = moov_end = 0
    fragments = ends_with_table = False
    for box in _boxes(file, 0, size):
        if box.kind == b"sidx" and not fragments:
            listed_end = max(listed_end, _listed_end(file, box))
        if box.kind in (b"moov", b"moof") or (box.kind != b"mdat" and box.end - box.start <= _MOST_SEARCHED):
            file.seek(box.start)
            header.read(file.read(box.end - box.start))
        if box.kind in (b"moof", b"mdat"):
            end = box.end
        elif box.kind == b"moov":
            moov_end = box.end
        fragments |= box.kind == b"moof"
        ends_with_table |= box.kind == b"mfra" and box.end <= size
    if not (header.fragmented or fragments):
        # FFmpeg's index has every sample of such a file, if all of the header is there.
        return DeclaredLength(size_bytes=moov_end)
    if ends_with_table or listed_end or end > size:
        return DeclaredLength(size_bytes=max(end, listed_end))
    return DeclaredLength(duration_s=header.duration_s)


def _listed_end(file: BinaryIO, sidx: _Box) -> int:
    """Where the last fragment of a segment index ends; 0 where it lists no more than the next fragment."""
    file.seek(sidx.start)
    version = file.read(4)[0]
    layout = ">8xQQHH" if version else ">8xIIHH"
    _, first_offset, _, count = struct.unpack(layout, file.read(struct.calcsize(layout)))
    sizes = [struct.unpack(">I8x", file.read(12))[0] & 0x7FFFFFFF for _ in range(count)]
    return sidx.end + first_offset + sum(sizes) if count > 1 else 0


_SEGMENT, _INFO, _CLUSTER = 0x18538067, 0x1549A966, 0x1F43B675
_TIMESTAMP_SCALE, _DURATION = 0x2AD7B1, 0x4489


def _ebml(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int | None]]:
    """Id, start and end of the content of the EBML elements between two positions; no end where the size is unknown."""
    while start < end:
        file.seek(start)
        head = file.read(12)
        id_length = 9 - head[0].bit_length() if head else 9
        if id_length > 4 or len(head) <= id_length:
            return
        rest = head[id_length:]
        length = 9 - rest[0].bit_length()
        if length > 8 or len(rest) < length:
            return
        size = int.from_bytes(rest[:length]) & ((1 << 7 * length) - 1)
        content = start + id_length + length
        known = size != (1 << 7 * length) - 1
        yield int.from_bytes(head[:id_length]), content, content + size if known else None
        if not known:
            return
        start = content + size


def _matroska(file: BinaryIO, size: int) -> DeclaredLength:
    for element, start, end in _ebml(file, 0, size):
        if element == _SEGMENT:
            return DeclaredLength(end) if end is not None else DeclaredLength(duration_s=_segment_s(file, start, size))
    return DeclaredLength()


def _segment_s(file: BinaryIO, start: int, size: int) -> float | None:
    """Duration of a segment; None where it declares none."""
    for element, content, end in _ebml(file, start, size):
        if element == _CLUSTER:
            break
        if element == _INFO and end is not None:
            found = {}
            for inner, at, stop in _ebml(file, content, end):
                if stop is not None and stop - at <= 8:
                    file.seek(at)
                    found[inner] = file.read(stop - at)
            raw = found.get(_DURATION, b"")
            duration = struct.unpack(">d" if len(raw) == 8 else ">f", raw)[0] if len(raw) in (4, 8) else 0.0
            scale_ns = int.from_bytes(found.get(_TIMESTAMP_SCALE, b"")) or 1_000_000
            return _positive(duration * scale_ns / 1e9)
    return None


def _avi(file: BinaryIO, size: int) -> DeclaredLength:
    end = 0
    while end + 12 <= size:
        file.seek(end)
        tag, length = struct.unpack("<4sI", file.read(8))
        if tag != b"RIFF":
            break
        if length in (0, 0xFFFFFFFF):
            return DeclaredLength()
        end += 8 + length + length % 2
    return DeclaredLength(end - _RIFF_SLACK if end else None)


def _flv(file: BinaryIO, size: int) -> DeclaredLength:
    head = file.read(_HEAD_BYTES)
    total, duration_s = (_amf_number(head, name) for name in (b"filesize", b"duration"))
    if total is not None and total >= size:
        return DeclaredLength(int(total))
    if duration_s is None:
        return DeclaredLength()
    end = int.from_bytes(head[5:9]) + 4
    while end + 11 <= size:
        file.seek(end)
        tag = file.read(4)
        if tag[0] & 0x1F not in (8, 9, 18):
            break
        end += 11 + int.from_bytes(tag[1:]) + 4
    # The size that follows each tag may be missing after the last one.
    return DeclaredLength(end - 4) if end - 4 > size else DeclaredLength(duration_s=duration_s)


def _amf_number(head: bytes, name: bytes) -> float | None:
    """A number of onMetaData."""
    key = struct.pack(">H", len(name)) + name + b"\0"
    at = head.find(key)
    if at < 0 or len(head) < at + len(key) + 8:
        return None
    return _positive(struct.unpack_from(">d", head, at + len(key))[0])


_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_BROADCAST = 1


def _asf(file: BinaryIO, size: int) -> DeclaredLength:
    head = file.read(_HEAD_BYTES)
    at = head.find(_ASF_FILE_PROPERTIES)
    if at < 0:
        return DeclaredLength()
    total, flags = struct.unpack_from("<40xQ40xI", head, at)
    return DeclaredLength() if flags & _ASF_BROADCAST or not total else DeclaredLength(total)


def _ivf(file: BinaryIO, size: int) -> DeclaredLength:
    # libvpx counts frames here and FFmpeg ticks; there are at least as many ticks.
    header, rate, scale, length = struct.unpack("<6xH8xIII", file.read(28))
    end = header
    while end + 12 <= size:
        file.seek(end)
        end += 12 + int.from_bytes(file.read(4), "little")
    return DeclaredLength(end) if end > size else DeclaredLength(duration_s=_positive(length * scale / max(rate, 1)))


_MXF_PARTITION = bytes.fromhex("060e2b34020501010d01020101")


def _mxf(file: BinaryIO, size: int) -> DeclaredLength:
    """The first partition gives the place of the last one, zero where it was not yet known."""
    head = file.read(_HEAD_BYTES)
    at = 16  # After the key of the partition.
    at += 1 + (head[at] & 0x7F if head[at] > 0x7F else 0)
    (footer,) = struct.unpack_from(">Q", head, at + 24)
    return DeclaredLength(footer + len(_MXF_PARTITION)) if footer else DeclaredLength()


def _positive(value: float) -> float | None:
    return value if 0 < value < math.inf else None


_MAGIC: Sequence[tuple[bytes, tuple[str, Callable[[BinaryIO, int], DeclaredLength]]]] = (
    (rb"\x1a\x45\xdf\xa3", ("matroska", _matroska)),
    (rb"RIFF....AVI", ("avi", _avi)),
    (rb"FLV", ("flv", _flv)),
    (rb"\x30\x26\xb2\x75", ("asf", _asf)),
    (rb"DKIF", ("ivf", _ivf)),
    (re.escape(_MXF_PARTITION), ("mxf", _mxf)),
    # Its first box may be any.
    (rb"", ("mov", _mp4)),
)

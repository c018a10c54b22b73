"""Seals of checkpoints that we write: a SHA-256 in the comment of torch's archive, of all bytes before it.

A zip archive may end with a comment, which `torch.load` passes over. So a checkpoint, which is replaced as a whole,
carries its own checksum, and a single changed bit is noticed by whoever reads it. A seal finds damage; it does not
protect against deliberate changes. Files of other programs have none.
"""

from __future__ import annotations

import hashlib
import re
from typing import BinaryIO

_END = b"PK\x05\x06"
_END_BYTES = 22
_COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
_COMMENT_BYTES = len("sha256:") + 64
_LENGTH = _COMMENT_BYTES.to_bytes(2, "little")


def sealed(data: bytes) -> bytes:
    """An archive that ends without a comment, with its seal. ValueError for anything else."""
    if data[-_END_BYTES:][:4] != _END or data[-2:] != b"\0\0":
        raise ValueError("it is not a zip archive that ends without a comment")
    head = data[:-2] + _LENGTH
    return head + b"sha256:" + hashlib.sha256(head).hexdigest().encode()


def check_seal(file: BinaryIO, size: int) -> None:
    """ValueError where the open archive of `size` bytes is not what was sealed; nothing where it has no seal."""
    tail_bytes = _END_BYTES + _COMMENT_BYTES
    if size < tail_bytes:
        return
    file.seek(size - tail_bytes)
    tail = file.read(tail_bytes)
    end, comment = tail[:_END_BYTES], tail[_END_BYTES:]
    match = _COMMENT.fullmatch(comment)
    # One changed bit may hide one of these, not all.
    traces = [end[:4] == _END, end[-2:] == _LENGTH, comment.startswith(b"sha256:"), match is not None]
    if sum(traces) < 2:
        return
    file.seek(0)
    digest, left = hashlib.sha256(), size - _COMMENT_BYTES
    while left > 0 and (block := file.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if not all(traces) or match is None or digest.hexdigest().encode() != match[1]:
        raise ValueError("it is not what was sealed: a part of it has changed since it was written")

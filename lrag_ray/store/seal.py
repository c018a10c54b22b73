"""Seals: a checksum inside a file that no other file records one of.

Commits name the checksums of latents, traces and videos. Records (JSON) and score tables (parquet) are named by nobody,
so each carries the SHA-256 of its own content, and a single changed bit is noticed by whoever reads it. A seal finds
damage; it does not protect against deliberate changes. Files of versions before seals have none and
are read as they are.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from pydantic_core import from_json

from lrag_ray.text_file import MOST_VALUE_BYTES, is_json_bomb

_JSON = re.compile(rb',\n "seal": "sha256:([0-9a-f]{64})"\n}\Z')
_JSON_BYTES = len(',\n "seal": "sha256:"\n}') + 64
_JSON_TRACES = (b'"seal"', b'"sha256:')

PARQUET_KEY = "seal"
"""Key of the seal in the metadata of a parquet file."""
PARQUET_BLANK = "sha256:" + "0" * 64
"""Its value before the file is sealed."""
# Thrift's compact form of the key and the value: type and length before each.
_PARQUET = re.compile(rb"\x18\x04seal\x18\x47sha256:([0-9a-f]{64})")
_PARQUET_TRACES = (b"\x18\x04seal", b"\x47sha256:")
_PARQUET_SEARCHED = 1 << 16
"""Bytes before the end of a parquet file within which its metadata keeps the seal."""


class DamagedError(ValueError):
    """The content is not what was sealed."""


def sealed_json(text: str) -> bytes:
    """A JSON object, not empty, with its seal as the last key."""
    head = text.rstrip().removesuffix("}").rstrip().encode()
    return head + b',\n "seal": "sha256:' + hashlib.sha256(head).hexdigest().encode() + b'"\n}'


def opened_json(data: bytes) -> bytes:
    """The object without its seal; DamagedError unless it is what was sealed."""
    match = _JSON.search(data, max(0, len(data) - _JSON_BYTES))
    if match is None:
        # One changed bit may hide one of these, not both.
        if any(trace in data[-2 * _JSON_BYTES :] for trace in _JSON_TRACES):
            raise DamagedError("its seal is damaged")
        return data
    head = data[: match.start()]
    if hashlib.sha256(head).hexdigest().encode() != match[1]:
        raise DamagedError("it is not what was sealed")
    return head + b"\n}"


def parsed_json(data: bytes) -> Any:
    """What a stranger's JSON holds, without its seal; ValueError for what is none or would fill the memory.

    Pydantic's own parser copies the whole input into each of its errors.
    """
    if is_json_bomb(data):
        raise ValueError(f"its values take more than {MOST_VALUE_BYTES >> 20} MiB")
    return from_json(opened_json(data), allow_inf_nan=False)


def check_placed(data: bytes, path: str) -> None:
    """DamagedError unless `data` is a sealed object whose key `path` says that it is stored at `path`."""
    if not is_sealed_json(data):
        raise DamagedError("its seal is missing or damaged")
    if (place := parsed_json(data).get("path")) != path:
        raise DamagedError(f"is the record of {place}")


def is_sealed_json(data: bytes) -> bool:
    """Whether the object has a seal, right or wrong."""
    return _JSON.search(data, max(0, len(data) - _JSON_BYTES)) is not None


def sealed_parquet(data: bytes) -> bytes:
    """A parquet file whose metadata holds `PARQUET_BLANK`, with its seal in that place."""
    match = _last_parquet_seal(data)
    if match is None:
        raise ValueError("the parquet file has no place for a seal")
    return data[: match.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[match.end(1) :]


def check_parquet(data: bytes) -> None:
    """DamagedError unless a sealed parquet file is what was sealed."""
    match = _last_parquet_seal(data)
    if match is None:
        if any(trace in data[-_PARQUET_SEARCHED:] for trace in _PARQUET_TRACES):
            raise DamagedError("its seal is damaged")
        return
    digest = hashlib.sha256(data[: match.start(1)])
    digest.update(b"0" * 64)
    digest.update(data[match.end(1) :])
    if digest.hexdigest().encode() != match[1]:
        raise DamagedError("it is not what was sealed")


def is_sealed_parquet(data: bytes) -> bool:
    """Whether the file has a seal, right or wrong."""
    return _last_parquet_seal(data) is not None


def _last_parquet_seal(data: bytes) -> re.Match[bytes] | None:
    # The content before the metadata may hold any text, this one too.
    return next(reversed(list(_PARQUET.finditer(data, max(0, len(data) - _PARQUET_SEARCHED)))), None)

"""Safetensors files of strangers: their tensors, or one error for whatever is wrong with them.

The library refuses most of what is not such a file, but lets other errors through for precisions that torch lacks and
sizes beyond 63 bits, and takes twenty times a header's bytes to read it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

MOST_HEADER_BYTES = 1 << 24
"""Of the JSON in front of the values: more than 100,000 tensors."""


class NotTensorsError(ValueError):
    """Bytes are not a safetensors file, or one of a kind that is not read; the text says why."""


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, mapped to it. NotTensorsError where it is not a safetensors file, OSError."""
    refuse_long_header(path)
    with one_error(), safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file's bytes. NotTensorsError where they are not a safetensors file."""
    _refuse_long(data[:8])
    with one_error():
        tensors: dict[str, Tensor] = load(data)
    return tensors


def refuse_long_header(path: Path) -> None:
    """NotTensorsError for a file that says that its header is longer than any that is read; OSError."""
    with path.open("rb") as file:
        _refuse_long(file.read(8))


def _refuse_long(head: bytes) -> None:
    if len(head) == 8 and (length := struct.unpack("<Q", head)[0]) > MOST_HEADER_BYTES:
        raise NotTensorsError(f"its header says it has {length:,} bytes, and at most {MOST_HEADER_BYTES:,} are read")


@contextmanager
def one_error() -> Iterator[None]:
    """NotTensorsError for whatever the library raises in the block."""
    try:
        yield
    except SafetensorError as error:
        raise NotTensorsError(str(error)) from error
    except Exception as error:
        # torch puts its C++ frames below.
        reason = (str(error).splitlines() or [""])[0][:200]
        raise NotTensorsError(f"it holds tensors that torch lacks ({type(error).__name__}: {reason})") from error

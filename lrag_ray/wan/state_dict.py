"""State-dict files from strangers: read safely, fitted strictly, named by digest.

Nothing is executed on reading (`weights_only`), the tensors stay mapped to the file until they are used, and a file
that does not fit the model is refused with a list of what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lrag_ray.errors import WeightsError

_NAMES_SHOWN = 8


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a ``.pt``/``.pth`` or ``.safetensors`` file, tensors on the CPU and mapped to the file.

    The format is told from the content, not from the suffix. Raises WeightsError if the file is absent, truncated or
    holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise WeightsError(f"checkpoint {path} is {what}; expected a .pt or .safetensors file. Mend: correct the path")
    with path.open("rb") as file:
        head = file.read(16)
    if _is_safetensors(head, path.stat().st_size):
        return _read_safetensors(path)
    return _read_torch(path, head)


def _is_safetensors(head: bytes, size: int) -> bool:
    """A safetensors file begins with the byte length of its JSON header and the header's brace."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (header_bytes,) = struct.unpack("<Q", head[:8])
    return bool(2 <= header_bytes <= max(size, 1 << 27))


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise WeightsError(_truncated(path, f"a safetensors file that cannot be read ({error})")) from error


_TROUBLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    zipfile.BadZipFile,
    IndexError,
    TypeError,
    AttributeError,
)
"""What torch's unpickler raises over bytes that are cut off or no pickle."""


def _read_torch(path: Path, head: bytes) -> dict[str, Any]:
    is_zip = zipfile.is_zipfile(path)
    if head.startswith(b"PK") and not is_zip:
        raise WeightsError(_truncated(path, "a torch zip archive without its end, so it is truncated"))
    try:
        # Only zip archives can be mapped; the older pickle format is read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"checkpoint {path} is refused: it is no torch file, or it holds objects that run code on loading "
            f"({str(error).splitlines()[0]}). Mend: use the published file, or save the state dict alone"
        ) from error
    except _TROUBLE as error:
        raise WeightsError(_truncated(path, f"a torch file that cannot be read ({error})")) from error
    if not isinstance(content, dict):
        raise WeightsError(f"checkpoint {path} holds a {type(content).__name__}, expected a dict")
    return content


def _truncated(path: Path, looks_like: str) -> str:
    size = path.stat().st_size
    return (
        f"checkpoint {path} ({size:,} bytes) looks like {looks_like}. "
        "Mend: compare its size with the source and fetch it again"
    )


def misfits(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    """Lines that say which names of `found` are missing, unexpected or misshapen; empty when everything fits."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = {name: list(getattr(found[name], "shape", ())) for name in sorted(expected.keys() & found.keys())}
    misshapen = [
        f"{name} is {shape}, expected {list(expected[name].shape)}"
        for name, shape in shapes.items()
        if not isinstance(found[name], Tensor) or shape != list(expected[name].shape)
    ]
    return [
        f"{kind} {len(names)}: {_shown(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str, mend: str) -> None:
    """Give a module (usually built on the meta device) the tensors of a state dict, without copying them.

    Raises WeightsError naming `source`, everything that does not fit, and `mend`.
    """
    wrong = misfits(tensors, module.state_dict())
    if wrong:
        listed = "\n  ".join(wrong)
        raise WeightsError(f"{source} does not fit the model:\n  {listed}\nMend: {mend}")
    module.load_state_dict(tensors, strict=True, assign=True)


def state_dict_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and values, independent of order, file format and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""State-dict files from strangers: read safely, fitted strictly, named by digest.

Nothing is executed on reading (see `tensor_pickle`), the tensors stay mapped to the file until they are used, and a
file that does not fit the model is refused with a list of what is wrong.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.wan.file_kinds import HEAD_BYTES, absence, foreign_zip, is_safetensors, is_zip, no_weights
from lrag_ray.wan.tensor_file import NotTensorsError, read_tensors
from lrag_ray.wan.tensor_rebuild import PickleRefusedError
from lrag_ray.wan.torch_file import read_torch_file

_NAMES_SHOWN, _NAME_SHOWN = 8, 200
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_orig_mod|module)\."
)
"""What FSDP, activation checkpointing, torch.compile and data-parallel training leave in names."""


_STORED = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
"""Precisions that weights may be stored in: narrower ones are rounded for kernels and scales that are not here."""
_STORED_AS = "bfloat16 or float32 (float16 and float64 load too)"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a ``.pt``/``.pth`` or ``.safetensors`` file, tensors on the CPU and mapped to the file.

    A TorchScript archive gives the tensors of its modules; its code is not run.

    The format is recognised by content, not by suffix. Raises WeightsError if the file is absent, truncated or
    holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        odd = "a folder" if path.is_dir() else "a pipe, a socket or a device" if path.exists() else None
        what = odd or absence(path)
        raise WeightsError(f"checkpoint {path} is {what}; expected a .pt or .safetensors file. Fix: correct the path")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise WeightsError(
            f"checkpoint {path} cannot be read: {error.strerror}. Fix: let this user read it, or correct the path"
        ) from error
    if is_safetensors(head, size):
        return _read_safetensors(path)
    if mistaken := no_weights(head, path.suffix) or (foreign_zip(path) if is_zip(head) else None):
        raise WeightsError(f"checkpoint {path} {mistaken}")
    return _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return read_tensors(path)
    except (NotTensorsError, OSError) as error:
        if unknown := re.search(r"(?:Dtype not understood: |unknown variant `)(\w+)", str(error)):
            raise WeightsError(
                f"checkpoint {path} holds tensors of {unknown[1]}, expected {_STORED_AS}. "
                "Fix: use the published file in one of these"
            ) from error
        raise WeightsError(_damaged(path, f"a safetensors file that cannot be read ({error})")) from error


def _read_torch(path: Path) -> dict[str, Any]:
    size = f"{path.stat().st_size:,}"
    try:
        content = read_torch_file(path)
    except PickleRefusedError as error:
        raise WeightsError(
            f"checkpoint {path} ({size} bytes) is refused: {error}. "
            "Fix: use the published file, or save the state dict alone"
        ) from error
    except zipfile.BadZipFile as error:
        reason = f"a torch zip archive without its end or with a damaged one, so it is truncated ({error})"
        raise WeightsError(_damaged(path, reason)) from error
    except Exception as error:
        # Over bytes that are not a pickle the readers of the standard library raise anything.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise WeightsError(_damaged(path, f"a torch file that cannot be read ({reason})")) from error
    if not isinstance(content, dict):
        raise WeightsError(
            f"checkpoint {path} holds a {type(content).__name__}, expected a dict of tensors. "
            "Fix: save the state dict itself, or give another file"
        )
    return {str(name): value for name, value in content.items()}


def _damaged(path: Path, looks_like: str) -> str:
    size = path.stat().st_size
    return (
        f"checkpoint {path} ({size:,} bytes) looks like {looks_like}. "
        "Fix: compare its size with the source and fetch it again"
    )


def unwrapped(name: str) -> str:
    """A tensor's name without what training wrapped around the modules."""
    return _WRAPPERS.sub("", name)


def misfits(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    """Lines that say which names of `found` are missing, unexpected or unfit; empty when everything fits."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    both = sorted(expected.keys() & found.keys())
    misshapen = [
        f"{name} is {list(getattr(found[name], 'shape', ()))}, expected {list(expected[name].shape)}"
        for name in both
        if not isinstance(found[name], Tensor) or found[name].shape != expected[name].shape
    ]
    no_numbers = [
        f"{name} is {kind}"
        for name in both
        if isinstance(found[name], Tensor) and (kind := _unusable(found[name], expected[name]))
    ]
    return [
        f"{kind} {len(names)}: {_shown(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
            ("of another kind", no_numbers),
        )
        if names
    ]


def _unusable(found: Tensor, expected: Tensor) -> str | None:
    """Why a tensor cannot stand for `expected`, its precision aside; None where it can."""
    if found.layout != torch.strided:
        return "sparse, expected a dense tensor"
    if found.device.type == "meta":
        return "without values"
    if expected.is_floating_point() and found.dtype not in _STORED:
        return f"{str(found.dtype).removeprefix('torch.')}, expected {_STORED_AS}"
    return None


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(name[:_NAME_SHOWN] for name in names[:_NAMES_SHOWN]) + more


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str, fix: str) -> None:
    """Give a module (usually built on the meta device) the tensors of a state dict, without copying them.

    Raises WeightsError naming `source`, everything that does not fit, and `fix`.
    """
    wrong = misfits(tensors, module.state_dict())
    if wrong:
        listed = "\n  ".join(wrong)
        raise WeightsError(f"{source} does not fit the model:\n  {listed}\nFix: {fix}")
    module.load_state_dict(tensors, strict=True, assign=True)


@torch.no_grad()
def refuse_non_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsError naming `source` and the tensors that hold NaN or infinities. Reads every value."""
    broken = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all()
    ]
    if broken:
        raise WeightsError(
            f"{source} holds NaN or infinite values in {len(broken)} of {len(tensors)} tensors: {_shown(broken)}. "
            "Fix: use another file, or fetch this one again; training that diverged leaves such weights"
        )


def state_dict_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and values, independent of order, file format and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

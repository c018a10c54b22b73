"""Weights that are stored in several files: folders with an index, numbered parts, and one part taken for the whole."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrag_ray.errors import WeightsError
from lrag_ray.text_file import read_text
from lrag_ray.wan.state_dict import read_checkpoint

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_INDEX_SUFFIX = ".index.json"
_MOST_PARTS = 1000
_MAX_INDEX_BYTES = 1 << 26


def read_weights(path: str | Path, what: str) -> dict[str, Any]:
    """Content of a file, or the tensors of all weight files of a folder.

    Raises WeightsError, which calls the weights `what`, for one part of several, a folder that lacks a part, and what
    `read_checkpoint` refuses.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path, what)
    if (part := _PART.fullmatch(path.name)) and int(part["count"]) > 1:
        raise WeightsError(
            f"{what} {path} is one part of several ({part['number']} of {part['count']}). "
            f"Fix: {_folder_to_give(path.parent, _numbered([path]))}"
        )
    if path.name.endswith(_INDEX_SUFFIX) and path.is_file():
        parts = {file for _, file in _indexed(path.parent, what)}
        raise WeightsError(
            f"{what} {path} is the index of weights that are split over several files. "
            f"Fix: {_folder_to_give(path.parent, parts)}"
        )
    return read_checkpoint(path)


def _folder_to_give(folder: Path, parts: set[str]) -> str:
    """Advice for one file of weights that are stored in several."""
    if parts and all((folder / name).is_file() for name in parts) and _holds_only_weights(folder):
        return f"give the folder of all parts, {folder}"
    return f"put all {len(parts)} parts (and their index) in a folder of their own and give that folder"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: .safetensors, or where there is none .bin, as older libraries wrote."""
    found = sorted(folder.glob("*.safetensors"))
    return found or sorted(file for file in folder.glob("*.bin") if file.name != "training_args.bin")


def _of_folder(folder: Path, what: str) -> dict[str, Any]:
    files = weight_files(folder)
    wanted = dict(_indexed(folder, what))
    if missing := sorted({*wanted.values(), *_numbered(files)} - {file.name for file in files}):
        count = len({*wanted.values(), *_numbered(files)})
        raise WeightsError(
            f"{what} {folder} lacks {', '.join(missing[:8])} ({len(missing)} of its {count} parts). "
            "Fix: put the missing parts there"
        )
    if not files:
        raise WeightsError(f"{what} {folder} {_without_weights(folder, what)}")
    tensors: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in files:
        held = read_checkpoint(file)
        if twice := sorted(held.keys() & tensors.keys()):
            raise WeightsError(
                f"{what} {folder}: {file.name} and another file both hold {twice[0]} ({len(twice)} tensors are there "
                "twice). Fix: leave one set of weights in the folder, or give one file of it"
            )
        tensors |= held
        origins |= dict.fromkeys(held, file.name)
    if strays := sorted(name for name, file in wanted.items() if origins.get(name) != file):
        raise WeightsError(
            f"{what} {folder}: its index says that {wanted[strays[0]]} holds {strays[0]}, which it does not "
            f"({len(strays)} such tensors). Fix: use the parts and the index of one release"
        )
    return tensors


def _indexed(folder: Path, what: str) -> Iterator[tuple[str, str]]:
    """Names of tensors and the files that hold them, as far as an index says."""
    for index in sorted(folder.glob(f"*{_INDEX_SUFFIX}")):
        try:
            parts = json.loads(read_text(index, "the index", WeightsError, most_bytes=_MAX_INDEX_BYTES))["weight_map"]
            if not isinstance(parts, dict):
                raise ValueError("its weight_map is not an object")
            named = [(str(name), str(file)) for name, file in parts.items()]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(
                f"{what} {folder}: {index.name} cannot be read as an index of weights ({error}). "
                "Fix: use the index that belongs to the parts"
            ) from error
        # An index beside weights of the other format belongs to files that are not read.
        kinds = {file.suffix for file in weight_files(folder)}
        yield from ((name, file) for name, file in named if not kinds or Path(file).suffix in kinds)


def _numbered(files: list[Path]) -> set[str]:
    """Names of all parts of every set of which one is there."""
    names = set[str]()
    for file in files:
        part = _PART.fullmatch(file.name)
        if part and int(part["count"]) <= _MOST_PARTS:
            count = int(part["count"])
            names |= {f"{part['stem']}-{i:05d}-of-{part['count']}{part['suffix']}" for i in range(1, count + 1)}
    return names


def _without_weights(folder: Path, what: str) -> str:
    if (folder / "model_index.json").is_file():
        inside = "text_encoder" if what.startswith("text") else "transformer"
        return f"is a whole Diffusers pipeline. Fix: give the folder inside it, {folder / inside}"
    if any(folder.glob("*.distcp")):
        return (
            "is a checkpoint of torch.distributed. Fix: convert it with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(folder))} generator.pt` and give "
            "that"
        )
    others = sorted(file for pattern in ("*.pt", "*.pth") for file in folder.glob(pattern))
    if others:
        return f"is a folder without a .safetensors file. Fix: give the file itself, such as {others[0]}"
    if quantised := sorted(folder.glob("*.gguf")):
        return (
            f"holds only GGUF files ({quantised[0].name}; weights quantised for llama.cpp and ComfyUI). "
            "Fix: give the same weights as .safetensors or .pt, in bfloat16 or float32"
        )
    return "is a folder without a .safetensors file. Fix: correct the path"


def _holds_only_weights(folder: Path) -> bool:
    suffixes = (".safetensors", ".bin", ".json", ".md", "")
    return all(file.is_file() and file.suffix in suffixes for file in folder.iterdir())

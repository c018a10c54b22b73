"""A stranger's folder of a chat model: what transformers would follow out of it is refused before it is opened.

Without trust_remote_code the library still fetches attention kernels that a config.json names, takes the base of an
adapter from where its configuration says, and loads the parts of weights from any path in their index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrag_ray.errors import ChatError
from lrag_ray.text_file import is_json_bomb, read_text

_MOST_BYTES = 1 << 26
_IMPLEMENTATIONS = {None, "eager", "sdpa", "grouped_mm", "batched_mm"}
"""Attention and experts of the libraries themselves; any other name may be an address of code."""
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "repetition_penalty")
"""What a generation_config.json decides. The rest could ask for any number of beams or answers."""


def refuse_other_code(folder: Path) -> None:
    """ValueError for a folder that leads to code or weights outside of it; OSError."""
    if (folder / "adapter_config.json").exists():
        raise ValueError("adapter_config.json leads to the weights of another model: merge the adapter into them first")
    for file in sorted(folder.glob("*.json")):
        try:
            text = read_text(file, "a file of the model", ChatError, most_bytes=_MOST_BYTES)
        except ChatError as error:
            raise ValueError(str(error)) from None
        if is_json_bomb(text):
            raise ValueError(f"{file.name} would take gigabytes of memory")
        if file.name.endswith(".index.json"):
            _check_index(file.name, text)
        elif file.name == "config.json":
            for name, value in _entries(json.loads(text)):
                if name.endswith(("attn_implementation", "experts_implementation")) and not _is_own(value):
                    raise ValueError(f"{file.name} names code of its own ({name}), which is not run: remove that entry")


def generation_settings(stored: Any) -> dict[str, Any]:
    """What counts of a folder's generation_config.json. ValueError for token ids that are none."""
    kept = {name: value for name in _KEPT if (value := getattr(stored, name, None)) is not None}
    for name, value in kept.items():
        if name == "repetition_penalty":
            is_fit = isinstance(value, int | float) and math.isfinite(value) and value > 0
        else:
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            is_fit = all(isinstance(token, int) and 0 <= token < 1 << 31 for token in ids)
        if not is_fit:
            raise ValueError(f"generation_config.json: {name} is {str(value)[:80]!r}, which no published model has")
    return kept


def _check_index(name: str, text: str) -> None:
    index = json.loads(text)
    parts = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(parts, dict):
        raise ValueError(f"{name} is not an index of weights")
    for part in parts.values():
        if not isinstance(part, str) or "/" in part or "\\" in part or not part.endswith(".safetensors"):
            raise ValueError(f"{name} names {str(part)[:80]!r} as a part, expected .safetensors files beside it")


def _is_own(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return all(one is None or (isinstance(one, str) and one in _IMPLEMENTATIONS) for one in values)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of objects, at any depth."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield from value.items()
            pending += value.values()
        elif isinstance(value, list):
            pending += value

"""The files of a folder of golden vectors, read once and offered by content."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from lrag_ray.errors import LragError, UsageError
from lrag_ray.text_file import MOST_CONFIG_BYTES, read_text
from lrag_ray.wan.tensor_file import one_error, refuse_long_header


class Vectors:
    """A safetensors file: names and shapes at once, values when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_long_header(path)
        with one_error(), safe_open(path, framework="pt", device="cpu") as file:
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 (safe_open is not a mapping)
            }

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def has(self, *names: str) -> bool:
        """Whether all of the named tensors are there."""
        return all(name in self.shapes for name in names)

    def named(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, without it."""
        return [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(f"{self.path.name} has no tensor {name!r}")
        with one_error(), safe_open(self.path, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name begins with `prefix`, keyed without it."""
        return {name: self[prefix + name] for name in self.named(prefix)}


class CaseRecord(NamedTuple):
    """A parsed JSON file."""

    path: Path
    content: Any

    def holds(self, *keys: str) -> bool:
        """Whether it is an object with all of `keys`."""
        return isinstance(self.content, dict) and all(key in self.content for key in keys)


class Broken(NamedTuple):
    """A file that cannot be read."""

    path: Path
    reason: str


class Folder:
    """JSON, safetensors and torch files that are directly in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[CaseRecord] = []
        self.vectors: list[Vectors] = []
        self.torch_files: list[Path] = []
        self.broken: list[Broken] = []
        self._json_bytes_left = MOST_CONFIG_BYTES
        for file in sorted(entry for entry in path.iterdir() if entry.is_file()):
            try:
                self._read(file)
            except (LragError, OSError, ValueError, RecursionError) as error:
                self.broken.append(Broken(file, f"cannot be read: {error}"))

    def _read(self, file: Path) -> None:
        match file.suffix:
            case ".json":
                text = read_text(file, "the record", UsageError, most_bytes=self._json_bytes_left)
                # Of all records together: they stay in memory, where each is many times as large.
                self._json_bytes_left -= file.stat().st_size
                self.records.append(CaseRecord(file, json.loads(text)))
            case ".safetensors":
                self.vectors.append(Vectors(file))
            case ".pt" | ".pth":
                self.torch_files.append(file)

    @cached_property
    def holds_data(self) -> bool:
        """Whether there is any file that golden vectors could be in."""
        return bool(self.records or self.vectors or self.torch_files or self.broken)

    def record(self, path: Path) -> CaseRecord | None:
        """The parsed JSON file at `path`, if it is one."""
        return next((record for record in self.records if record.path == path), None)


class Pair(NamedTuple):
    """The JSON and the tensors of one case; a lost half is None, so that it is reported and not forgotten."""

    stem: str
    record: CaseRecord | None
    vectors: Vectors | None


def pair(records: Iterable[CaseRecord], vectors: Iterable[Vectors]) -> list[Pair]:
    """Match the two halves of each case: by file stem, and the last one of each kind by elimination."""
    lone_records = {case_stem(record.path): record for record in records}
    lone_vectors = {case_stem(file.path): file for file in vectors}
    both = sorted(lone_records.keys() & lone_vectors.keys())
    pairs = [Pair(stem, lone_records.pop(stem), lone_vectors.pop(stem)) for stem in both]
    if len(lone_records) == len(lone_vectors) == 1:
        (stem, record), (_, file) = lone_records.popitem(), lone_vectors.popitem()
        pairs.append(Pair(stem, record, file))
    pairs += [Pair(stem, record, None) for stem, record in lone_records.items()]
    pairs += [Pair(stem, None, file) for stem, file in lone_vectors.items()]
    return sorted(pairs, key=lambda case: case.stem)


_PARTS = ("meta", "context_trace", "context_tokens")


def case_stem(path: Path) -> str:
    """Name of the case that a file belongs to: ``x`` for ``x.json``, ``x.meta.json`` and ``x.safetensors``."""
    stem, _, part = path.stem.rpartition(".")
    return stem if part in _PARTS else path.stem

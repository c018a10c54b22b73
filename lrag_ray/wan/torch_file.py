"""Files that ``torch.save`` and ``torch.jit.save`` write, read as data: their tensors, mapped to the file.

Three forms exist. A zip archive holds ``<root>/data.pkl`` and one record per storage; a TorchScript archive is the same
with the modules' code beside it, which is never parsed; before torch 1.6 a file was a row of pickles with the storages
behind them. `tensor_pickle` interprets the pickles; here storages are found and bounded by what the file holds.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lrag_ray.wan.file_kinds import BoundedFile
from lrag_ray.wan.tensor_pickle import MAX_BYTES, Module, StorageNeed, read_pickle
from lrag_ray.wan.tensor_rebuild import MAX_NAME, Allowance, PickleDamagedError, PickleRefusedError
from lrag_ray.wan.torch_seal import check_seal

_MAX_CODE_BYTES = 1 << 26
_MAX_RECORDS = 1 << 18
_MAX_SHARING = 8
"""Limit for the bytes of all tensors, in file sizes: tied weights share storages, bombs share one many times."""
_ALIGNMENT = 8
_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_torch_file(path: Path) -> Any:
    """Content of a file that torch wrote; a TorchScript archive gives a flat dict of its modules' tensors.

    Raises PickleRefusedError for what is not a tensor or plain container, ValueError or OSError for damage.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would block until a writer appears.
        raise PickleRefusedError("it is not a regular file")
    size = status.st_size
    with path.open("rb") as file:
        check_seal(file, size)
        file.seek(0)
        content = _from_archive(file, path, size) if file.read(2) == b"PK" else _from_pickles(file, path, size)
    held = _bytes_of_tensors(content)
    if held > _MAX_SHARING * size:
        raise PickleRefusedError(f"its tensors share storages and would fill {held:,} bytes once they are used")
    return content


class _Storages:
    """Parts of a file as storages, each made once."""

    def __init__(self, path: Path, size: int) -> None:
        self._whole = torch.UntypedStorage.from_file(os.fspath(path), False, size)
        self._parts: dict[tuple[int, int], torch.UntypedStorage] = {}
        self._may_copy = size

    def part(self, first: int, nbytes: int) -> torch.UntypedStorage:
        """Bytes from `first`: mapped, or copied where kernels could not read them in place."""
        if (first, nbytes) not in self._parts:
            part: torch.UntypedStorage = self._whole[first : first + nbytes]
            if first % _ALIGNMENT:
                self._may_copy -= nbytes
                if self._may_copy < 0:
                    raise PickleRefusedError("its storages overlap, so that they would fill more than the file")
                part = part.clone()
            self._parts[first, nbytes] = part
        return self._parts[first, nbytes]


def _from_archive(file: BinaryIO, path: Path, size: int) -> Any:
    bounded = BoundedFile(file)
    with zipfile.ZipFile(cast(BinaryIO, bounded)) as archive:
        bounded.most_bytes = MAX_BYTES
        entries = archive.infolist()
        if len(entries) > _MAX_RECORDS:
            raise PickleDamagedError(f"it is an archive of {len(entries):,} records")
        records = {entry.filename: entry for entry in entries}
        if len(records) != len(entries):
            raise PickleDamagedError("its archive holds two records of one name")
        roots = [
            name.removesuffix("/data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise ValueError(f"it is a zip archive, but not one that torch wrote ({len(roots)} data.pkl in it)")
        root = roots[0]
        if f"{root}/byteorder" in records and _record(archive, records[f"{root}/byteorder"], 16) != b"little":
            raise ValueError("it was written on a big-endian machine: save it again on a little-endian one")
        is_script = f"{root}/constants.pkl" in records
        if is_script:
            _refuse_loading_code(archive, records, root)
        storages = _Storages(path, size)

        def storage(need: StorageNeed) -> torch.UntypedStorage:
            entry = records.get(f"{root}/data/{need.key}")
            if entry is None:
                raise PickleDamagedError(f"its archive lacks the record data/{need.key[:40]}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(
                    "its tensors are compressed, as torch never does: unpack it and save it again with torch"
                )
            if entry.file_size != need.nbytes:
                raise PickleDamagedError(
                    f"it holds tensors of other sizes than it says (data/{need.key[:40]}: {entry.file_size:,} bytes, "
                    f"expected {need.nbytes:,})"
                )
            first = _data_offset(file, entry)
            if first + entry.file_size > size:
                raise PickleDamagedError(f"its record data/{need.key[:40]} reaches beyond its end")
            return storages.part(first, entry.file_size)

        content = read_pickle(
            io.BytesIO(_record(archive, records[f"{root}/data.pkl"], MAX_BYTES)), storage, Allowance()
        )
    if isinstance(content, Module):
        return dict(_tensors_of(content))
    if is_script:
        raise PickleRefusedError(f"it is a TorchScript archive of a {type(content).__name__}, not of a module")
    return content


def _record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    if entry.file_size > limit:
        raise PickleDamagedError(f"its record {entry.filename[:80]} says it has {entry.file_size:,} bytes")
    return archive.read(entry)


def _refuse_loading_code(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], root: str) -> None:
    """A module that makes its tensors by code of its own cannot be read without that code."""
    code = [entry for name, entry in records.items() if name.startswith(f"{root}/code/") and name.endswith(".py")]
    if sum(entry.file_size for entry in code) > _MAX_CODE_BYTES:
        raise PickleDamagedError("it is a TorchScript archive with more code than a network has")
    for entry in code:
        if b"__setstate__" in archive.read(entry):
            raise PickleRefusedError(
                f"it is a TorchScript archive with loading code of its own, which is not run: __setstate__ in "
                f"{entry.filename[len(root) + 1 :][:80]}"
            )


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    file.seek(entry.header_offset)
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04" or file.read(name_bytes).decode("utf-8", "replace") != entry.filename:
        raise PickleDamagedError(f"its record {entry.filename[:80]} is not where the archive says")
    return entry.header_offset + _LOCAL_HEADER.size + name_bytes + int(extra_bytes)


def _from_pickles(file: BinaryIO, path: Path, size: int) -> Any:
    """The older format: magic number, version, machine, object, names of storages, storages."""
    file.seek(0)
    allowance = Allowance()

    def no_storage(need: StorageNeed) -> None:
        raise PickleDamagedError("it refers to a storage before its content")

    if read_pickle(file, no_storage, allowance) != _MAGIC:
        raise PickleRefusedError("it is a pickle, but not one that torch wrote")
    version, machine = read_pickle(file, no_storage, allowance), read_pickle(file, no_storage, allowance)
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it is of an unknown version, or of a big-endian machine")
    begin, sizes = file.tell(), dict[str, int]()

    def measure(need: StorageNeed) -> None:
        if sizes.setdefault(need.key, need.nbytes) != need.nbytes:
            raise PickleDamagedError(f"its storage {need.key[:40]} has two sizes")

    read_pickle(file, measure, allowance)
    keys = read_pickle(file, no_storage, allowance)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleDamagedError("its list of storages is missing")
    storages, first, at = _Storages(path, size), dict[str, int](), file.tell()
    for key in keys:
        # Eight bytes repeat the number of elements.
        first[key] = at + 8
        at += 8 + sizes.get(key, 0)
        if at > size or key not in sizes:
            raise PickleDamagedError("its storages are cut off")

    def storage(need: StorageNeed) -> torch.UntypedStorage:
        if need.key not in first:
            raise PickleDamagedError(f"it lacks the storage {need.key[:40]}")
        start, length = need.view or (0, need.nbytes)
        return storages.part(first[need.key] + start, length)

    file.seek(begin)
    return read_pickle(file, storage, allowance)


def _tensors_of(module: Module) -> Iterator[tuple[str, Tensor]]:
    pending: list[tuple[str, Any]] = [("", module)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Module):
            if len(name) > MAX_NAME:
                raise PickleRefusedError(f"its modules nest until names have {len(name):,} characters")
            prefix = f"{name}." if name else ""
            pending += [(prefix + key, part) for key, part in reversed(value.attributes.items())]


def _bytes_of_tensors(content: Any) -> int:
    """Bytes that the tensors in nested containers would fill, one used twice counted once."""
    found: dict[int, int] = {}
    pending = [content]
    seen = set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            found[id(value)] = value.numel() * value.element_size() if value.device.type != "meta" else 0
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value
    return sum(found.values())

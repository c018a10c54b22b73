"""Latents as other programs store them: ``latent_000000.pt`` files in a folder, and WebDataset tar shards.

A ``.pt`` file is one tensor [T, C, H, W] that ``torch.save`` wrote. A shard holds ``latent_000000.pth`` with the same
tensor and ``latent_000000.json`` with its `LatentNote`. Files from elsewhere are data: their pickles are interpreted by
`lrag_ray.wan.torch_file`, and the names in a shard never become paths.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from lrag_ray.errors import StorageError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.records import Count, Record
from lrag_ray.text_file import MOST_LINES
from lrag_ray.wan.file_kinds import BoundedFile
from lrag_ray.wan.tensor_rebuild import PickleRefusedError
from lrag_ray.wan.torch_file import read_torch_file

NOTES_FILE = "latents.jsonl"
"""Beside ``.pt`` files: one `LatentNote` a line."""
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_TENSORS, _NOTE = (".pt", ".pth"), ".json"
_MOST_MEMBER_BYTES = 1 << 34
_MOST_NOTE_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 17
_BLOCK = 1 << 24


class BadLatentError(Exception):
    """A file does not hold latents that a dataset can have; the message says why."""


class LatentNote(Record):
    """What is known of an exported latent besides its values."""

    file: str = Field(max_length=1000)
    latents_digest: str = Field(max_length=64)
    """The note counts only beside latents with this digest."""
    key: str = Field(max_length=64)
    prompt_index: Count
    prompt_id: str = Field(max_length=1000)
    prompt: str
    sample: Count
    backbone: str = Field(max_length=1000)
    method: str = Field(max_length=1000)


class FoundLatent(NamedTuple):
    """A latent of a folder or shard, or the reason why it cannot be used."""

    name: str
    latents: Tensor | None
    """[T, C, H, W], or None."""
    note: LatentNote | None
    problem: str = ""


def file_name(index: int) -> str:
    """Name of the latent at a position, without suffix."""
    return f"latent_{index:06d}"


def tensor_bytes(latents: Tensor) -> bytes:
    """A tensor as ``torch.save`` writes it."""
    sink = io.BytesIO()
    torch.save(latents, sink)
    return sink.getvalue()


def dtype_name(latents: Tensor) -> str:
    """Name of the precision. BadLatentError for one that a dataset cannot have."""
    if latents.dtype not in _DTYPES:
        raise BadLatentError(f"holds {latents.dtype}, expected bfloat16, float16 or float32")
    return _DTYPES[latents.dtype]


def read_latent(path: Path) -> Tensor:
    """Latents [T, C, H, W] of a ``.pt`` file, contiguous. BadLatentError for anything else."""
    try:
        content = read_torch_file(path)
    except PickleRefusedError as error:
        raise BadLatentError(f"is refused: {error}") from error
    except zipfile.BadZipFile as error:
        raise BadLatentError(f"is truncated or damaged ({error})") from error
    except Exception as error:
        # Over bytes that are not a pickle the readers of the standard library raise anything.
        raise BadLatentError(f"cannot be read ({[*str(error).splitlines(), type(error).__name__][0]})") from error
    if not isinstance(content, Tensor):
        raise BadLatentError(f"holds a {type(content).__name__}, expected one tensor [T, C, H, W]")
    if content.layout != torch.strided:
        raise BadLatentError(f"holds a tensor of layout {content.layout}, expected a dense one")
    if content.dim() != 4 or 0 in content.shape:
        raise BadLatentError(f"holds a tensor {list(content.shape)}, expected [T, C, H, W]")
    dtype_name(content)
    return content.contiguous()


def add_to_shard(shard: tarfile.TarFile, name: str, latents: Tensor, note: LatentNote) -> None:
    """Add a latent and its note; equal latents give equal bytes."""
    for suffix, data in ((".pth", tensor_bytes(latents)), (_NOTE, note.model_dump_json().encode())):
        member = tarfile.TarInfo(name + suffix)
        member.size = len(data)
        shard.addfile(member, io.BytesIO(data))


def read_shard(path: Path, scratch: Path) -> Iterator[FoundLatent]:
    """The latents of a tar shard in order; what is damaged is yielded with its problem."""
    held: tuple[str, Tensor | None, str] | None = None
    note: LatentNote | None = None
    if not path.is_file():
        yield FoundLatent(path.name, None, None, "is not a regular file")
        return
    try:
        with path.open("rb") as file:
            bounded = BoundedFile(file, tarfile.ReadError, _BLOCK)
            bounded.left = _MOST_HEADER_BYTES
            shard = tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:")  # noqa: SIM115 - it holds no file
            for member in _members(shard, bounded):
                stem, dot, ending = member.name.rpartition("/")[2].partition(".")
                suffix = f"{dot}{ending}"
                if not member.isfile() or (suffix not in _TENSORS and suffix != _NOTE):
                    continue
                if held is not None and stem != held[0]:
                    yield _found(held, note)
                    held, note = None, None
                data = shard.extractfile(member)
                assert data is not None, "a member that is a file has content"
                if suffix == _NOTE:
                    note = _parsed_note(data.read(_MOST_NOTE_BYTES))
                    continue
                held = (stem, *_member(member, data, scratch / "member.pt"))
            end = shard.offset
        if held is not None:
            yield _found(held, note)
        if not _ends_at(path, end):
            yield FoundLatent(path.name, None, None, "has no end of a tar archive, so it is truncated")
    except Exception as error:  # noqa: BLE001 - over bytes that are not an archive the library's reader raises anything
        if held is not None:
            yield _found(held, note)
        place = f" from {held[0]} on" if held is not None else ""
        yield FoundLatent(path.name, None, None, f"is a truncated or damaged tar archive{place} ({error})")


def _members(shard: tarfile.TarFile, bounded: BoundedFile) -> Iterator[tarfile.TarInfo]:
    """The members of a shard in order, each once, none of them kept.

    Raises ReadError for extended headers and maps of sparse files that no shard has, and where a size below zero leads
    back: Python's reader would read all of the former into memory, and the latter for ever.
    """
    last = -1
    while True:
        bounded.left = _MOST_HEADER_BYTES
        member = shard.next()
        bounded.left = None
        if member is None:
            return
        if member.offset <= last:
            raise tarfile.ReadError("its members overlap")
        last = member.offset
        shard.members.clear()  # type: ignore[attr-defined]
        yield member


def _ends_at(path: Path, offset: int) -> bool:
    """Whether the empty header that ends an archive is there; Python's reader takes the end of the file for it."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _found(held: tuple[str, Tensor | None, str], note: LatentNote | None) -> FoundLatent:
    return FoundLatent(held[0], held[1], note, held[2])


def _member(member: tarfile.TarInfo, data: IO[bytes], copy: Path) -> tuple[Tensor | None, str]:
    if member.issparse():
        return None, "is stored as a sparse file, as no tensor is"
    if member.size > _MOST_MEMBER_BYTES:
        return None, f"says it has {member.size:,} bytes"
    try:
        with copy.open("wb") as file:
            while block := data.read(_BLOCK):
                file.write(block)
    except tarfile.ReadError:
        return None, f"is truncated: the shard ends within its {member.size:,} bytes"
    try:
        # The copy is replaced by the next member's while this tensor may still be mapped to it.
        return read_latent(copy).clone(), ""
    except BadLatentError as error:
        return None, str(error)


def read_notes(storage: Storage) -> dict[str, LatentNote]:
    """Notes beside ``.pt`` files, by file name; lines that are none are left out. StorageError for too many lines."""
    try:
        data = storage.read_bytes(NOTES_FILE)
    except FileNotFoundError:
        return {}
    if (lines := data.count(b"\n") + data.count(b"\r")) > MOST_LINES:
        raise StorageError(
            f"{storage.uri}/{NOTES_FILE} has {lines:,} lines, and at most {MOST_LINES:,} are read. Fix: remove it"
        )
    notes = (_parsed_note(line) for line in data.splitlines())
    return {note.file: note for note in notes if note is not None}


def _parsed_note(data: bytes) -> LatentNote | None:
    try:
        return LatentNote.opened(data)
    except ValueError:
        return None


def values_digest(latents: Tensor) -> str:
    """SHA-256 over the values of contiguous latents in frame order."""
    return hashlib.sha256(latents.view(torch.uint8).numpy().data).hexdigest()


def first_not_finite(latents: Tensor) -> str:
    """Which latent frames [T, C, H, W] hold NaN or infinity, in words; empty where none does."""
    finite = latents.isfinite().flatten(1).all(1)
    if bool(finite.all()):
        return ""
    count = int((~finite).sum())
    verb = "holds" if count == 1 else "hold"
    first = int(finite.int().argmin())
    return f"{counted(count, 'latent frame')} {verb} NaN or infinity, the first is frame {first}"

"""Safetensors files that the library half believes: one error, and little memory."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest

from lrag_ray.conformance.files import Folder
from lrag_ray.errors import WeightsError
from lrag_ray.store.address import Storage
from lrag_ray.store.embeddings import features_in
from lrag_ray.store.parts import BrokenPartError, read_latents
from lrag_ray.store.records import LatentPart
from lrag_ray.wan.file_kinds import refuse_odd_files
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.wan.tensor_file import MOST_HEADER_BYTES, NotTensorsError, read_tensors, tensors_in


def written(dtype: str, shape: list[int], values: int) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, values]}
    header = json.dumps({"latents": entry, "rows": entry | {"data_offsets": [values, 2 * values]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(2 * values)


ODD = {
    "a precision that torch lacks": written("F6_E2M3", [16], 12),
    "half a byte per value": written("F4", [2, 8], 8),
    "a size beyond 63 bits": written("F32", [1 << 63, 0], 0),
    "a long header": struct.pack("<Q", MOST_HEADER_BYTES + 1) + b"{" + bytes(MOST_HEADER_BYTES),
    "no header": b"{}",
}


@pytest.mark.parametrize("kind", ODD)
def test_every_reader_refuses_what_is_no_tensor(tmp_path: Path, kind: str) -> None:
    data = ODD[kind]
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(NotTensorsError):
        tensors_in(data)
    assert features_in(data, "x.safetensors") is None
    part = LatentPart(
        path="x.safetensors", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), first_frame=0, frames=16
    )
    with pytest.raises(BrokenPartError, match="is not a safetensors file"):
        read_latents(Storage(str(tmp_path)), part)


@pytest.mark.parametrize("kind", ["a size beyond 63 bits", "a long header"])
def test_a_file_of_weights_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(ODD[kind])
    with pytest.raises(NotTensorsError):
        read_tensors(path)
    with pytest.raises(WeightsError, match=r"x\.safetensors .* cannot be read .*Fix: "):
        read_checkpoint(path)


def test_a_long_header_is_not_read_by_any_library(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(ODD["a long header"])
    with pytest.raises(ValueError, match=r"its header says it has 16,777,217 bytes"):
        refuse_odd_files(tmp_path)
    (broken,) = Folder(tmp_path).broken
    assert "its header says" in broken.reason

"""Safetensors files that the library half believes: one error, and little memory."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from lrag_ray.conformance.files import Folder
from lrag_ray.errors import WeightsError
from lrag_ray.store.address import Storage
from lrag_ray.store.embeddings import features_in
from lrag_ray.store.parts import BrokenPartError, read_latents, read_part, trace_bytes
from lrag_ray.store.records import FileRecord, LatentPart, PartRecord
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
    with pytest.raises(BrokenPartError, match="is not a latent part: "):
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


def stored(tmp_path: Path, tensors: dict[str, Tensor]) -> LatentPart:
    data = save(tensors)
    (tmp_path / "x.safetensors").write_bytes(data)
    return LatentPart(
        path="x.safetensors", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), first_frame=0, frames=3
    )


LATENTS = torch.zeros(3, 1, 2, 2)


@pytest.mark.parametrize(
    "latents", [LATENTS.long(), LATENTS.bool(), LATENTS.double(), LATENTS.to(torch.float8_e5m2), torch.tensor(1.0)]
)
def test_latents_are_floats_of_four_axes(tmp_path: Path, latents: Tensor) -> None:
    part = stored(tmp_path, {"latents": latents})
    with pytest.raises(BrokenPartError, match="does not hold 3 latent frames"):
        read_latents(Storage(str(tmp_path)), part)


@pytest.mark.parametrize("name", ["state.", "state.x.y", "state.-1.y", "state.²", f"state.{'9' * 5000}.x"])
def test_a_state_that_is_of_no_block_breaks_its_part(tmp_path: Path, name: str) -> None:
    part = stored(tmp_path, {"latents": LATENTS, name: LATENTS.clone()})
    storage = Storage(str(tmp_path))
    data = trace_bytes([])
    storage.write("no trace", data)
    trace = FileRecord(path="no trace", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    record = PartRecord(rollout_key="k", attempt="a", latents=part, trace=trace, device_kind="cpu")
    with pytest.raises(BrokenPartError, match="which is no block's"):
        read_part(storage, record, 3)


@pytest.mark.parametrize("rows", [torch.tensor(1.0), torch.zeros(4), torch.zeros(4, 2).long()])
def test_features_are_rows_of_floats(rows: Tensor) -> None:
    for checksum in (torch.zeros(32, dtype=torch.uint8), torch.zeros(32).to(torch.float8_e5m2)):
        assert features_in(save({"rows": rows, "sha256": checksum}), "x.safetensors") is None
        assert features_in(save({"rows": torch.zeros(4, 2), "sha256": checksum}), "x.safetensors") is None

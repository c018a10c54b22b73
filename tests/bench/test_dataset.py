"""The benchmark of reading latents reads the bytes that it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrag_ray.bench.dataset import _forget, _pieces, _read_raw, bench_dataset, make_dataset
from lrag_ray.errors import UsageError
from lrag_ray.store.datasets import LatentDataset


def test_both_sides_read_the_same_bytes(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path, 2)
    data = LatentDataset.open(uri)
    assert (len(data), data.shape, data.dtype) == (2, (16, 60, 104), torch.bfloat16)
    out = torch.zeros(8, 16, 60, 104, dtype=torch.bfloat16)
    (piece,) = _pieces(data, 1, 80, 8)
    _forget({f"{uri}/{piece.path}"})
    _read_raw(piece, out.view(torch.uint8).view(-1).numpy().data)
    assert torch.equal(out, data.read(1, 80, 8))
    found = bench_dataset([uri], passes=1, windows=4, readers=2).as_dict()
    assert found["windows_per_pass"] == 4 and found["warm"]["ratio"] > 0 and found["cold"]["windows_per_s"] > 0
    with pytest.raises(UsageError, match="no rollout has 91 latent frames"):
        bench_dataset([uri], window=91)

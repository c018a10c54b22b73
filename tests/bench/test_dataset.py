"""The benchmark of reading latents reads the bytes that it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lrag_ray.bench.dataset import _forget, _pieces, _read_raw, bench_dataset, make_dataset
from lrag_ray.cli.app import app
from lrag_ray.errors import UsageError
from lrag_ray.pipelines.dataset_import import import_dataset
from lrag_ray.store.dataset_files import file_name, tensor_bytes
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
    assert (found["rollouts"], found["left_out_count"], found["left_out"]) == (2, 0, ())
    with pytest.raises(UsageError, match=r"no rollout has 91 latent frames(.|\n)*has 90 latent frames, fewer"):
        bench_dataset([uri], window=91)


def test_what_no_window_is_drawn_from_is_counted_and_named(tmp_path: Path) -> None:
    source = tmp_path / "latents"
    source.mkdir()
    for number, frames in enumerate((8, 12, 7)):
        (source / f"{file_name(number)}.pt").write_bytes(tensor_bytes(torch.randn(frames, 4, 6, 8).bfloat16()))
    uri = str(tmp_path / "dataset")
    assert import_dataset(str(source), uri, window=1).imported == 3
    shown = CliRunner().invoke(app, ["bench", "dataset", uri, "--passes", "1", "--windows", "2", "--readers", "1"])
    found = json.loads(shown.stdout)
    line = f"{uri}/latent_000002.pt: has 7 latent frames, fewer than a window of 8"
    assert (found["rollouts"], found["left_out_count"], found["left_out"]) == (2, 1, [line])
    assert shown.stderr == f"Left out:\n  {line}\n"

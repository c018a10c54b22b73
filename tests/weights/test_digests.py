from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.errors import WeightsError
from lrag_ray.weights import digests
from lrag_ray.weights.digests import weights_digest
from tests.stages.make import BACKBONE, make_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"one")
    assert weights_digest(str(file)) == hashlib.sha256(b"one").hexdigest()
    read: list[Path] = []
    real = digests.file_digest  # type: ignore[attr-defined]

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    assert weights_digest(str(file)) == hashlib.sha256(b"one").hexdigest()
    assert read == []
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert weights_digest(str(file)) == hashlib.sha256(b"two").hexdigest()
    assert read == [file]


def test_a_folder_is_its_files_by_name_and_content(tmp_path: Path) -> None:
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x.json").write_text(content)
    one, same, other = (weights_digest(str(tmp_path / name)) for name in "abc")
    assert one == same != other


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing\.pt cannot be read"):
        weights_digest(str(tmp_path / "nothing.pt"))


def test_relative_paths_of_weights_are_resolved_for_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = {**BACKBONE, "weights": {"path": "w.pt", "lora": {"path": "s3://bucket/lora.pt"}}}
    config = make_config("run", backbones={"b": backbone}, methods={"rag": {"method": "rag", "encoder": "e.pt"}})
    resolved = with_absolute_paths(config)
    weights = resolved.backbones["b"].weights
    assert weights.path == str(tmp_path / "w.pt")
    assert weights.lora is not None and weights.lora.path == "s3://bucket/lora.pt"
    assert resolved.methods["rag"].settings == {"encoder": str(tmp_path / "e.pt")}
    unchanged = resolved.model_dump(exclude={"backbones", "methods"})
    assert unchanged == config.model_dump(exclude={"backbones", "methods"})

"""Files that are not whole, or something else than a generator: every one is named, with what to do."""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch
from safetensors.torch import save, save_file

from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer, mapped_transformer
from lrag_ray.wan.file_kinds import BoundedFile
from tests.wan.make import CONFIG, State, saved, wrapped


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "I8"])
def test_another_precision_is_told_from_the_header_alone(tmp_path: Path, state: State, dtype: str) -> None:
    path = tmp_path / "generator.safetensors"
    whole = save(state)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    bits, at = {"F4": 4, "F6_E2M3": 6}.get(dtype, 8), 0
    for entry in header.values():
        size = math.prod(entry["shape"]) * bits // 8
        entry |= {"dtype": dtype, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(at))
    with pytest.raises(WeightsError, match=r"expected bfloat16 or float32(.|\n)*Fix:") as refusal:
        mapped_transformer(path, CONFIG)
    assert "compare its size" not in str(refusal.value), "the file is whole"


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    with pytest.raises(WeightsError, match=r"loop\.pt is a symbolic link that leads to itself;"):
        load_transformer(tmp_path / "loop.pt", CONFIG)
    (tmp_path / "lost.pt").symlink_to("old/generator.pt")
    with pytest.raises(WeightsError, match=r"lost\.pt is a symbolic link to old/generator\.pt, which is not there;"):
        load_transformer(tmp_path / "lost.pt", CONFIG)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, state: State, suffix: str) -> None:
    path = tmp_path / f"generator{suffix}"
    if suffix == ".pt":
        torch.save({"generator": wrapped(state)}, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="compare its size with the source"):
        load_transformer(path, CONFIG)


@pytest.mark.parametrize("form", ["zip", "pickle", "safetensors"])
def test_wherever_a_file_is_cut_off_it_is_refused_with_a_fix(tmp_path: Path, state: State, form: str) -> None:
    path = tmp_path / ("generator.safetensors" if form == "safetensors" else "generator.pt")
    whole = saved(state, form)
    for end in [*range(0, 70, 3), *range(100, len(whole), len(whole) // 11), *range(len(whole) - 30, len(whole), 7)]:
        path.write_bytes(whole[:end])
        with pytest.raises(WeightsError, match=r"Fix:"):
            load_transformer(path, CONFIG)


def repacked(whole: bytes, *, compressed: bool = False, halved: bool = False, emptied: bool = False) -> bytes:
    """A torch archive whose tensors were changed behind torch's back."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(buffer, "w", method) as target:
        for name in source.namelist():
            content = source.read(name)
            if "/data/" not in name:
                target.writestr(name, content)
            elif not emptied:
                target.writestr(name, content[: len(content) // 2] if halved else content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compressed": True}, "tensors are compressed"),
        ({"halved": True}, "tensors of other sizes"),
        ({"emptied": True}, "cannot be read"),
    ],
)
def test_an_archive_that_would_be_mapped_as_garbage_is_refused(
    tmp_path: Path, state: State, change: dict[str, bool], said: str
) -> None:
    path = tmp_path / "generator.pt"
    path.write_bytes(repacked(saved(state, "zip"), **change))
    with pytest.raises(WeightsError, match=said):
        load_transformer(path, CONFIG)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:7cace0da2b44\nsize 5676070424\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("generator.pt", b"", "is empty"),
        ("generator.pt", LFS, "Git LFS pointer to a file of 5,676,070,424 bytes"),
        ("generator.safetensors", LFS, "Git LFS pointer"),
        ("generator.safetensors", b"<!DOCTYPE html><title>404</title>", "a web page"),
        ("generator.pt", b"\n<html>log in, please \xc3", "a web page"),
        ("generator.pt", b'{"error": "Invalid user name"}', 'is text .it begins with \'{"error"'),
        ("model.safetensors.index.json", b'{"metadata": {"total_size": 1}, "weight_map": {}}', "split over several"),
        ("generator.pt", b"\x1f\x8b\x08" + bytes(99), "gzip archive"),
        ("gen-Q4_0.gguf", b"GGUF\x03" + bytes(99), r"is a GGUF file .weights quantised.*Fix: give the same weights as"),
        ("generator.tar", bytes(257) + b"ustar\x0000" + bytes(300), "is a tar archive"),
        ("generator.pt", b"\xfd7zXZ\x00" + bytes(99), "is an xz archive"),
        ("generator.safetensors", b"\x93NUMPY\x01" + bytes(99), "is a NumPy array"),
        ("generator.pt", b"\x00\x00\x00\x20ftypisom" + bytes(99), "is an MP4 or MOV video"),
        ("net.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x8c\x01" + bytes(99), "is an ONNX model"),
        ("generator.pt", b"\x08\x0a:\xe4\x04\x0a\x1d" + bytes(99), "is an ONNX model"),
        ("generator.pt", bytes(999), "neither a torch file nor a safetensors file"),
        ("generator.safetensors", struct.pack("<Q", 10**12) + b"{}", "does not begin as such a file does"),
        ("generator.safetensors", struct.pack("<Q", 10) + b'{"a": 1, "b": 2}', "cannot be read"),
        ("generator.pt", b"PK\x05\x06" + bytes(18), "torch did not write"),
    ],
)
def test_mixed_up_downloads_are_told(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=said) as refusal:
        load_transformer(path, CONFIG)
    assert re.search("Fix:", str(refusal.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path, state: State) -> None:
    path = tmp_path / "generator.pt"
    path.write_bytes(saved(state, "zip"))
    path.chmod(0)
    with pytest.raises(WeightsError, match=r"cannot be read: .*Fix"):
        load_transformer(path, CONFIG)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "generator.pt"
    torch.save({"generator": Harmful()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="refused: it holds getattr, which is not a tensor") as refusal:
        load_transformer(path, CONFIG)
    # torch's own text advises to load with code execution allowed.
    assert "weights_only" not in str(refusal.value)
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not there"):
        load_transformer(tmp_path / "absent.pt", CONFIG)
    with pytest.raises(WeightsError, match="a folder"):
        load_transformer(tmp_path, CONFIG)
    for content in ([1, 2], torch.zeros(2), 7):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(WeightsError, match=r"expected a dict of tensors\. Fix:"):
            load_transformer(tmp_path / "other.pt", CONFIG)


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zipped(**{"release/model.pt": b"x"}), r"a zip archive that torch did not write; it holds release/model\.pt\."),
        (zipped(**{"a.npy": b"x", "b.npy": b"x"}), r"a NumPy archive \(\.npz\) of 2 arrays"),
    ],
)
def test_archives_of_others_are_named_and_never_to_be_fetched_again(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "generator.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=f"{said}(.|\n)*Fix: ") as refusal:
        load_transformer(tmp_path / "generator.pt", CONFIG)
    assert "again" not in str(refusal.value)


def test_a_generator_with_its_lora_around_it_is_named(tmp_path: Path, state: State) -> None:
    layer = "blocks.0.self_attn.q"
    around = wrapped({name.replace(f"{layer}.", f"{layer}.base_layer."): value for name, value in state.items()})
    around[f"model.{layer}.lora_A.default.weight"] = torch.zeros(2, 24)
    around[f"model.{layer}.lora_B.default.weight"] = torch.zeros(24, 2)
    torch.save({"generator": around}, tmp_path / "generator.pt")
    with pytest.raises(WeightsError, match=r"saved with its LoRA around it by PEFT(.|\n)*Fix: merge it first"):
        load_transformer(tmp_path / "generator.pt", CONFIG)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["blocks.0.self_attn.q.lora_A.weight"], "the file is a LoRA, which weights.lora.path takes"),
        (["encoder.conv1.weight", "decoder.conv1.weight"], "the file is a VAE or a retrieval encoder"),
        (["token_embedding.weight"], "the file is a umT5 text encoder"),
        (["blocks.0.self_attn.q.scale_weight", "scaled_fp8"], "the file is quantised"),
        (["img_emb.proj.0.weight"], "an image-to-video generator"),
    ],
)
def test_weights_of_other_networks_are_named(tmp_path: Path, names: list[str], said: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=said) as refusal:
        load_transformer(tmp_path / "other.safetensors", CONFIG)
    assert "again" not in str(refusal.value)


def test_a_long_directory_of_an_archive_is_not_read() -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number in range(100):
            archive.writestr(f"{number:050}", b"")
    with zipfile.ZipFile(cast(BinaryIO, BoundedFile(content, most_bytes=20_000))) as archive:
        assert len(archive.namelist()) == 100
    with pytest.raises(zipfile.BadZipFile, match=r"says that one of its parts has 9,600 bytes"):
        zipfile.ZipFile(cast(BinaryIO, BoundedFile(content, most_bytes=5000)))


def test_what_is_read_in_all_has_a_limit_where_one_is_set() -> None:
    bounded = BoundedFile(io.BytesIO(bytes(30)), most_bytes=10)
    bounded.left = 15
    assert len(bounded.read(10)) == len(bounded.read(5)) + 5 == 10
    with pytest.raises(zipfile.BadZipFile, match="does not end"):
        bounded.read(1)
    bounded.left = None
    assert bounded.read() == bytes(10)

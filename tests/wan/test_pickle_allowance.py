"""How much a pickle may make its reader do: a small file never takes long, and a large honest one is read whole."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lrag_ray.errors import WeightsError
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.wan.tensor_rebuild import Allowance
from tests.wan.torch_files import older, text, zipped

ORDERED, SUBCLASS = b"ccollections\nOrderedDict\n", b"ctorch._tensor\n_rebuild_from_type_v2\n"
TENSOR, META = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04t"
TRILLION = b"\x8a\x06" + (10**12).to_bytes(6, "little")


def _list(item: bytes = b"N") -> bytes:
    return b"](" + item * 1000 + b"e"


def _dict(width: int = 2) -> bytes:
    """A dict of a thousand numbers; those of ten bytes all have the same hash."""
    step = (1 << 61) - 1 if width > 8 else 1
    numbers = ((step * at).to_bytes(width, "little") for at in range(1000))
    return b"}(" + b"".join(b"\x8a" + bytes([width]) + number + b"N" for number in numbers) + b"u"


def _calls(shared: bytes, call: bytes) -> bytes:
    """A pickle that gives one object, memo entry 0, to a hundred calls."""
    return b"\x80\x02" + shared + b"q\x000" + (call + b"0") * 100 + b"}."


BUSY: dict[str, tuple[bytes, str]] = {
    "a dict copied": (_calls(_dict(), ORDERED + b"h\x00\x85R"), "copies"),
    "pairs copied": (_calls(_list(b"NN\x86"), ORDERED + b"h\x00\x85R"), "copies"),
    "pairs that are long": (b"\x80\x02" + _list() + b"q\x00" + ORDERED + _list(b"h\x00") + b"\x85R.", "not pairs"),
    "a size copied": (_calls(_list(), b"ctorch\nSize\nh\x00\x85R"), "copies"),
    "a set copied": (_calls(_list(), b"cbuiltins\nset\nh\x00\x85R"), "copies"),
    "a text encoded": (_calls(text("x" * 1000), b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"), "copies"),
    "arguments passed": (_calls(b"(" + b"N" * 1000 + b"t", b"ctorch\ndevice\nh\x00R"), "copies"),
    "attributes set": (
        _calls(b"}(" + b"".join(text(str(at)) + b"N" for at in range(1000)) + b"u", b"c__torch__\nNet\n)\x81h\x00b"),
        "copies",
    ),
    "tensors of one storage": (
        _calls(
            b"(" + STORAGE + b"Q" + b"K\x00K\x01\x85K\x01\x85\x89}t",
            (TENSOR + b"h\x00R0") * 20 + b"N",
        ),
        "copies",
    ),
    "one storage": (_calls(STORAGE, b"h\x00Q0" * 20 + b"N"), "copies"),
    "keys of one hash": (b"\x80\x02" + _dict(10) + b".", "copies"),
    "lists in a list": (b"\x80\x02" + _list(b"]") + b"q\x000" + _list(b"h\x00") + b".", "nests"),
    "a long name": (b"\x80\x04" + text("__torch__") + text("x" * 2000) + b"\x93.", "name of 2,009"),
    "a storage with a long name": (
        b"\x80\x02" + STORAGE.replace(text("0"), text("x" * 2000)) + b"Q.",
        "name of 2,000",
    ),
    "a subclass by another way": (b"\x80\x02" + SUBCLASS + b"(" + ORDERED + b"N)NtR.", "OrderedDict, which is none of"),
}


@pytest.mark.parametrize("busy", BUSY)
def test_what_a_pickle_makes_its_reader_copy_has_a_limit(
    busy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Allowance, "MAX_VALUES", 10_000)
    monkeypatch.setattr("lrag_ray.wan.tensor_pickle._MAX_ENTRIES", 100_000)
    data, named = BUSY[busy]
    path = tmp_path / "generator.pt"
    path.write_bytes(zipped(data, **{"data/0": bytes(16)}))
    with pytest.raises(WeightsError, match=rf"generator\.pt (.|\n)*{named}"):
        read_checkpoint(path)


def test_the_pickles_of_one_older_file_share_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "generator.pt"
    path.write_bytes(older(b"\x80\x02" + _dict() + b"."))
    assert len(read_checkpoint(path)) == 1000
    # Its content is interpreted twice: once for the sizes of its storages.
    monkeypatch.setattr(Allowance, "MAX_STEPS", 3000)
    with pytest.raises(WeightsError, match="steps"):
        read_checkpoint(path)


def _tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    return TENSOR + b"(" + STORAGE + b"Q" + offset + size + stride + b"\x89}tR"


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (_tensor(b"K\x00" + TRILLION + b"\x86", b"K\x01K\x01\x86"), r"\[0, 1000000000000\] is larger"),
        (_tensor(b"K\x00" + b"J\xff\xff\xff\x7f" * 2 + b"\x87", b"K\x01K\x01K\x01\x87"), r"\[0, .* is larger"),
        (_tensor(b"K\x00\x85", b"K\x01\x85", TRILLION), r"\[0\] reaches beyond its 4"),
        (_tensor(b"K\x01\x85", TRILLION + b"\x85"), r"impossible strides: \[1000000000000\]"),
        (_tensor(b"K\x01\x85", b"K\x01\x85", b"]q\x00h\x00a"), "begins at a list"),
        (_tensor(b"K\x01J\xff\xff\xff\xff\x86", b"K\x01K\x01\x86"), "impossible shape"),
        (META + b"(ctorch\nfloat32\n" + TRILLION + b"\x85K\x01\x85\x89tR", r"\[1000000000000\] is larger"),
    ],
)
def test_shapes_that_no_storage_bounds_have_limits(made: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "generator.pt"
    path.write_bytes(zipped(b"\x80\x02" + made + b".", **{"data/0": bytes(16)}))
    with pytest.raises(WeightsError, match=rf"generator\.pt (.|\n)*{named}"):
        read_checkpoint(path)


def test_a_checkpoint_with_its_optimizer_is_far_from_every_limit(tmp_path: Path) -> None:
    path, count = tmp_path / "training.pt", 2500
    moments = {at: {"step": float(at), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(1, 2)} for at in range(count)}
    content = {
        "model": OrderedDict((f"blocks.{at}.weight", torch.ones(2)) for at in range(count)),
        "optimizer": {"state": moments, "param_groups": [{"params": list(range(count)), "betas": (0.9, 0.999)}]},
        "losses": [0.5] * 100_000,
        # Optimizers of before torch 1.6 name parameters by their address.
        "older": {140_000_000_000_000 + 64 * at: at for at in range(1000)},
    }
    torch.save(content, path)
    read = read_checkpoint(path)
    assert read.keys() == content.keys()
    assert read["model"].keys() == content["model"].keys()  # type: ignore[attr-defined]
    assert read["optimizer"]["state"][count - 1]["exp_avg_sq"].tolist() == [[1, 1]]
    assert {name: read[name] for name in ("losses", "older")} == {name: content[name] for name in ("losses", "older")}

"""Weight files that contradict themselves or promise too much: refused within bounds of time and memory."""

from __future__ import annotations

import resource
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.retrieval.encoder import load_encoder
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import OFFICIAL
from lrag_ray.scoring.vbench_long.weights import WeightFiles
from lrag_ray.wan.checkpoint import mapped_transformer
from lrag_ray.wan.lora import Lora, fitting_lora
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.wan.text import UMT5Sizes, mapped_text_encoder
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import mapped_vae
from tests.wan.make import CONFIG
from tests.wan.torch_files import text, zipped


def expanded(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(1).expand(shape)


def test_expanded_tensors_are_refused_before_anything_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "generator.pt"
    torch.save({"generator": {"head.head.bias": expanded((100_000, 1_000_000))}}, path)
    assert path.stat().st_size < 2000
    with pytest.raises(
        WeightsError, match=r"refused: a tensor of \[100000, 1000000\] repeats 1 stored values"
    ) as refusal:
        mapped_transformer(path, CONFIG)
    assert "400,000,000,000 bytes" in str(refusal.value)


def bomb(folder: Path, kind: str) -> Callable[[], object]:
    """A file of a few kB that fills gigabytes where it is converted before it is checked."""
    path = folder / "bomb.pt"
    big = expanded((40_000, 40_000))
    match kind:
        case "generator" | "lora":
            torch.save({"generator": {"blocks.0.ffn.0.lora_A.weight": big, "head.head.bias": big}}, path)
            return lambda: mapped_transformer(path, CONFIG)
        case "encoder":
            torch.save({"config": {"latent_dim": 40_000}, "model": {"encoder.fc.weight": big}}, path)
            return lambda: load_encoder(path)
        case "vae":
            torch.save({"decoder.head.2.weight": big}, path)
            return lambda: mapped_vae(path)
        case "text encoder":
            torch.save({"token_embedding.weight": big}, path)
            return lambda: mapped_text_encoder(path)
        case "scoring":
            path = folder / OFFICIAL["laion_linear"].path
            path.parent.mkdir(parents=True)
            torch.save({"weight": big, "bias": big}, path)
            return lambda: WeightFiles(folder).read("laion_linear", {"weight": torch.empty(1, 768, device="meta")})
        case "one storage for many":
            part = torch.zeros(1 << 16)
            torch.save({f"blocks.{i}.bias": part.view(1 << 16) for i in range(5000)}, path)
            return lambda: read_checkpoint(path)
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind", ["generator", "lora", "encoder", "vae", "text encoder", "scoring", "one storage for many"]
)
def test_a_small_file_never_fills_the_memory(kind: str, tmp_path: Path) -> None:
    read = bomb(tmp_path, kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match="refused"):
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "in kB"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"latent_dim": 10**9}, "latent_dim 1000000000 must be"),
        ({"hidden_dims": [8] * 100_000}, "hidden_dims"),
        ({"hidden_dims": 8}, "hidden_dims 8"),
        ({"hidden_dims": ["a", None]}, "hidden_dims"),
        ({"spatial_h": 1e300}, "spatial_h"),
    ],
)
def test_sizes_that_a_file_names_have_bounds(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pt"
    torch.save({"config": config, "model": {}}, path)
    with pytest.raises(WeightsError, match=named):
        load_encoder(path)


STRANGE: list[dict[Any, Any]] = [
    {},
    {1: torch.zeros(2)},
    {"decoder.middle.0.x": 3, 5: "x"},
    {"config": {1: 2}, "model": {3: torch.zeros(1)}},
    {"config": {"hidden_dims": [3]}, "model": {"x": None}},
    {"generator": {"a": None, 3: torch.zeros(1)}},
    {"state_dict": {3: torch.zeros(1)}},
    {"state_dict": {"weight": torch.zeros(1, 768, device="meta"), "bias": torch.zeros(1)}},
    {"weight": torch.zeros(1, 768).to_sparse(), "bias": torch.zeros(1)},
    {"params": {"weight": torch.zeros(1, 768, dtype=torch.complex64), "bias": torch.zeros(1)}},
    {"blocks.0.x.lora_A.weight": torch.zeros(2, 2)},
    {"token_embedding.weight": torch.zeros(2)},
]


@pytest.mark.parametrize("content", STRANGE, ids=str)
def test_every_reader_refuses_what_is_not_its_own(content: dict[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL["laion_linear"].path
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    with torch.device("meta"):
        transformer = CausalWanTransformer(CONFIG)
    readers: list[Callable[[], object]] = [
        lambda: mapped_transformer(path, CONFIG),
        lambda: fitting_lora(transformer, Lora(path, 2, 2.0)),
        lambda: load_encoder(path),
        lambda: mapped_vae(path, {"base_dim": 3, "num_res_blocks": 1}),
        lambda: mapped_text_encoder(path, UMT5Sizes(8, 4, 2, 2, 4, 1, 8)),
        lambda: Networks(WeightFiles(tmp_path)).aesthetic_head,
    ]
    for read in readers:
        with pytest.raises(WeightsError, match=path.name):
            read()


def _storage_reference(numel: bytes = b"K\x04", key: str = "0") -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + numel + b"tQ"


def _tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + _storage_reference()
        + offset
        + size
        + stride
        + b"\x89"
        + hooks
        + b"tR"
    )


def _twelve_of(number: int) -> bytes:
    """A list of twelve times the list before it, which becomes the memo's next entry."""
    return b"](" + b"h%c" % number * 12 + b"eq%c0" % (number + 1)


@pytest.mark.parametrize("form", ["zip", "older", "script"])
def test_flipped_bytes_give_a_message_or_tensors_within_bounds(form: str, tmp_path: Path) -> None:
    path, random = tmp_path / "generator.pt", Random(form)
    if form == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    else:
        content = {"generator": {"a": torch.zeros(9), "b": torch.zeros(3, 3).half()}, "more": [1, {"x": 2.0}]}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for _ in range(1000):
        changed = bytearray(whole)
        for _ in range(random.choice([1, 2, 5, 30])):
            changed[random.randrange(min(len(changed), random.choice([1500, 1 << 30])))] = random.randrange(256)
        path.write_bytes(changed)
        try:
            read = read_checkpoint(path)
        except WeightsError as error:
            assert "generator.pt" in str(error)
        else:
            assert sum(part.nbytes for part in _tensors(read)) <= 8 * len(whole)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []:
        yield from _tensors(part)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "a container in itself": (b"\x80\x02]q\x00h\x00a.", "holds itself"),
    "too deep": (b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".", "nests"),
    "too many entries": (b"\x80\x02]q\x000" + b"".join(map(_twelve_of, range(12))) + b"h\x0c.", "entries"),
    "a number of a megabyte": (b"\x80\x02\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20) + b".", "number of"),
    "a tuple as a key": (b"\x80\x02}))s.", "tuple as a key"),
    "a name without end": (b"\x80\x02}" + text("x" * 5000) + b"Ns.", "name of 5,000"),
    "nothing": (b".", "cannot be read"),
    "no end": (b"\x80\x02}", "cannot be read"),
    "text": (b"hello", "cannot be read"),
    "beyond the storage": (b"\x80\x02" + _tensor(b"K\x05\x85", b"K\x01\x85") + b".", "beyond its 4"),
    "far beyond": (
        b"\x80\x02" + _tensor(b"K\x02\x85", b"\x8a\x07" + b"\xff" * 6 + b"\x7f\x85") + b".",
        "cannot be read",
    ),
    "negative": (b"\x80\x02" + _tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85") + b".", "impossible shape"),
    "negative offset": (b"\x80\x02" + _tensor(b"K\x01\x85", b"K\x01\x85", b"J\xff\xff\xff\xff") + b".", "begins at -1"),
    "more steps than a checkpoint has": (b"\x80\x02" + b"]" * (1 << 22) + b".", "steps"),
    "more bytes than a checkpoint has": (b"\x80\x02X\xff\xff\xff\x7f" + bytes(1 << 10), "bytes, as no checkpoint"),
    "a line without end": (b"\x80\x02I" + b"1" * 20_000 + b"\n.", "line of more"),
    "overlapping": (b"\x80\x02" + _tensor(b"K\x03K\x02\x86", b"K\x01K\x01\x86") + b".", r"\[3, 2\] repeats 4"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_pickle_that_contradicts_itself_is_refused(damage: str, tmp_path: Path) -> None:
    data, named = DAMAGED[damage]
    path = tmp_path / "generator.pt"
    path.write_bytes(zipped(data, **{"data/0": bytes(16)}))
    with pytest.raises(WeightsError, match=rf"generator\.pt (.|\n)*{named}"):
        read_checkpoint(path)

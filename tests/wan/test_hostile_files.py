"""Weight files that try to act: every one is refused by name, and nothing that they bring is run."""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.retrieval.encoder import load_encoder
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import OFFICIAL
from lrag_ray.scoring.vbench_long.weights import WeightFiles
from lrag_ray.wan.checkpoint import mapped_transformer
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.lora import Lora, fitting_lora
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.wan.text import UMT5Sizes, load_tokenizer, mapped_text_encoder
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import mapped_vae

MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
MARKER = "acted"


def zipped(data: bytes, **records: bytes) -> bytes:
    """A torch archive with a pickle of our own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def older(data: bytes, **_: bytes) -> bytes:
    """The same in the format of before torch 1.6."""
    begin = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, MACHINE))
    return begin + data + pickle.dumps([], 2)


CONTAINERS: dict[str, Callable[..., bytes]] = {"zip": zipped, "older": older}


@pytest.fixture
def bait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Port of a listener; afterwards nobody has called and nothing has been written."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert list(work.iterdir()) == []


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


COMMAND = text(f"touch {MARKER}")
SYSTEM = b"cos\nsystem\n"
PICKLES: dict[str, tuple[bytes, str]] = {
    "reduce": (b"\x80\x02" + SYSTEM + COMMAND + b"\x85R.", r"os\.system"),
    "global alone": (b"\x80\x02" + SYSTEM + b".", r"os\.system"),
    "stack global": (b"\x80\x04" + text("os") + text("system") + b"\x93" + COMMAND + b"\x85R.", r"os\.system"),
    "inst": (b"(" + COMMAND + b"ios\nsystem\n.", "INST"),
    "obj": (b"\x80\x02(" + SYSTEM + COMMAND + b"o.", r"os\.system"),
    "obj of a known name": (b"\x80\x02(ctorch\nSize\n" + COMMAND + b"o.", "OBJ"),
    "newobj": (b"\x80\x02csubprocess\nPopen\n" + COMMAND + b"\x85\x81.", r"subprocess\.Popen"),
    "newobj of a known name": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "object of collections.OrderedDict"),
    "newobj_ex": (b"\x80\x04ctorch\nSize\n)}\x92.", "NEWOBJ_EX"),
    "build": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + b"Nsb.", "sets the state"),
    "build of a dict": (b"\x80\x02]" + b"}b.", "sets the state of a list"),
    "extension": (b"\x80\x02\x82\x07" + COMMAND + b"\x85R.", "EXT1"),
    "persistent id": (b"\x80\x02Pevil\n.", "PERSID"),
    "persistent text": (b"\x80\x02" + text("evil") + b"Q.", "object 'evil' outside"),
    "persistent module": (b"\x80\x02" + text("module") + COMMAND + b"\x86Q.", "object 'module' outside"),
    "buffers": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "bytearray": (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "bytearray"),
    "eval": (b"\x80\x02c__builtin__\neval\n" + COMMAND + b"\x85R.", "holds eval"),
    "getattr": (b"\x80\x02cbuiltins\ngetattr\nctorch\nTensor\n" + text("__reduce__") + b"\x86R.", "holds getattr"),
    "nested torch file": (
        b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x02hi\x85R.",
        r"torch\.storage\._load_from_bytes",
    ),
    "dotted name": (b"\x80\x04" + text("torch") + text("Size.__base__") + b"\x93.", r"torch\.Size\.__base__"),
    "other name of torch": (b"\x80\x02ctorch.hub\nload\n.", r"torch\.hub\.load"),
    "script code": (b"\x80\x02c__torch__\nEvil\n)\x81" + COMMAND + b"b.", "__setstate__"),
    "numpy": (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.", r"numpy\.core\.multiarray\._reconstruct"),
    "terminal": (b"\x80\x04" + text("os\x1b[2J") + text("system") + b"\x93.", r"os\?\[2J\.system"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", PICKLES)
def test_a_pickle_that_acts_is_refused_by_name(attack: str, container: str, tmp_path: Path, bait: int) -> None:
    data, named = PICKLES[attack]
    path = tmp_path / "generator.pt"
    path.write_bytes(CONTAINERS[container](data))
    with pytest.raises(WeightsError, match=rf"(?s)generator\.pt .* is refused: .*{named}") as refusal:
        read_checkpoint(path)
    assert "\x1b" not in str(refusal.value)


def test_the_registry_of_extensions_and_torchs_list_of_safe_names_open_nothing(tmp_path: Path, bait: int) -> None:
    path = tmp_path / "generator.pt"
    copyreg.add_extension("os", "system", 7)
    try:
        path.write_bytes(zipped(PICKLES["extension"][0]))
        with pytest.raises(WeightsError, match="EXT1"):
            read_checkpoint(path)
    finally:
        copyreg.remove_extension("os", "system", 7)
    with torch.serialization.safe_globals([os.system]):
        path.write_bytes(zipped(PICKLES["reduce"][0]))
        with pytest.raises(WeightsError, match=r"os\.system"):
            read_checkpoint(path)


class Caller:
    """Calls a port when it is unpickled."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __reduce__(self) -> tuple[Any, ...]:
        return socket.create_connection, (("127.0.0.1", self.port),)


class Whole(nn.Module):
    """A module that was saved whole."""


@pytest.mark.parametrize("container", [True, False])
def test_objects_in_a_checkpoint_are_not_made(container: bool, tmp_path: Path, bait: int) -> None:
    path = tmp_path / "generator.pt"
    for content, named in (
        ({"generator": {"a": Caller(bait)}}, r"socket\.create_connection"),
        ({"model": Whole()}, "Whole"),
        (Whole(), "Whole"),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=container)
        with pytest.raises(WeightsError, match=named):
            read_checkpoint(path)


def test_a_legacy_tar_is_not_unpacked(tmp_path: Path, bait: int) -> None:
    path = tmp_path / "generator.pt"
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle", f"../work/{MARKER}"):
            entry = tarfile.TarInfo(name)
            entry.size = len(PICKLES["reduce"][0])
            archive.addfile(entry, io.BytesIO(PICKLES["reduce"][0]))
    with pytest.raises(WeightsError, match=r"generator\.pt"):
        read_checkpoint(path)


def test_an_archive_in_an_archive_is_not_opened(tmp_path: Path, bait: int) -> None:
    path = tmp_path / "generator.pt"
    inner = zipped(PICKLES["reduce"][0])
    path.write_bytes(zipped(b"\x80\x02}.", **{"data/0": inner, "inner/data.pkl": PICKLES["reduce"][0]}))
    assert read_checkpoint(path) == {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.pt", inner)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match="torch did not write"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("state", ["Tensor", "Dict[str, Tensor]"])
def test_code_of_a_torchscript_archive_is_not_run(state: str, tmp_path: Path, bait: int) -> None:
    """`torch.jit.load` calls __setstate__: here it writes a file of its choice, with torch's own file operation."""
    source = tmp_path / "evil.py"
    value = "torch.zeros(3)" if state == "Tensor" else '{"weight": torch.zeros(3)}'
    source.write_text(
        "from typing import Dict\nimport torch\nfrom torch import Tensor\n"
        "class Evil(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.weight = torch.zeros(3)\n"
        "    def forward(self, x: Tensor) -> Tensor:\n        return x\n"
        f"    @torch.jit.export\n    def __getstate__(self) -> {state}:\n        return {value}\n"
        f"    @torch.jit.export\n    def __setstate__(self, state: {state}) -> None:\n"
        f"        self.weight = torch.from_file('{MARKER}', True, 3)\n        self.training = False\n"
        "torch.jit.save(torch.jit.script(Evil()), 'evil.pt')\n",
        encoding="utf-8",
    )
    subprocess.run([sys.executable, "-W", "ignore", source], cwd=tmp_path, check=True)
    path = tmp_path / OFFICIAL["clip_vitb32"].path
    path.parent.mkdir(parents=True)
    (tmp_path / "evil.pt").rename(path)
    for read in (lambda: WeightFiles(tmp_path).read("clip_vitb32", {}), lambda: read_checkpoint(path)):
        with pytest.raises(WeightsError, match=r"ViT-B-32\.pt .* is refused: .*__setstate__"):
            read()
    # The attack itself is a real one.
    torch.jit.load(path)
    assert Path(MARKER).exists()
    Path(MARKER).unlink()


def test_a_torchscript_archive_gives_its_tensors(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).half())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), tmp_path / "net.pt")
    read = read_checkpoint(tmp_path / "net.pt")
    assert read.keys() == module.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in module.state_dict().items())


EVERYTHING: dict[str, Any] = {
    "half": torch.rand(3, 4).half(),
    "turned": torch.arange(12).reshape(3, 4).t(),
    "part": torch.arange(100.0)[10:20],
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "parameter": nn.Parameter(torch.rand(2)),
    "bits": torch.tensor([True, False]),
    "complex": torch.rand(2, dtype=torch.complex64),
    "eight": torch.rand(4).to(torch.float8_e4m3fn),
    "modules": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(),
    "settings": {"lr": 1e-3, "steps": 2**40, "name": "ä", "shape": torch.Size([2, 3]), "on": True, "none": None},
    "list": [1, (2, 3), {4, 5}, b"bytes", torch.bfloat16, torch.device("cpu")],
}


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves_is_read_as_torch_reads_it(zip_format: bool, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "all.pt"
    # torch itself cannot write eight-bit tensors in the older format.
    content = EVERYTHING if zip_format else {name: value for name, value in EVERYTHING.items() if name != "eight"}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_format)
    ours, torchs = read_checkpoint(path), torch.load(path, weights_only=False)
    assert _flat(ours) == _flat(torchs)


def _flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.detach().flatten().contiguous().view(-1).tolist()
    if isinstance(value, dict):
        return {key: _flat(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_flat(part) for part in value]
    return "cpu" if value == torch.device("cpu") else value


CONFIG = WanConfig(dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2)


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
    "overlapping": (b"\x80\x02" + _tensor(b"K\x03K\x02\x86", b"K\x01K\x01\x86") + b".", r"\[3, 2\] repeats 4"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_pickle_that_contradicts_itself_is_refused(damage: str, tmp_path: Path) -> None:
    data, named = DAMAGED[damage]
    path = tmp_path / "generator.pt"
    path.write_bytes(zipped(data, **{"data/0": bytes(16)}))
    with pytest.raises(WeightsError, match=rf"generator\.pt (.|\n)*{named}"):
        read_checkpoint(path)


def _folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    sizes = {"vocab_size": 8, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2}
    (path / "config.json").write_text(json.dumps({**sizes, **config}), encoding="utf-8")
    (path / "modeling_evil.py").write_text(f"open('{MARKER}', 'w')\n", encoding="utf-8")
    save_file({"shared.weight": torch.zeros(8, 4)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"auto_map": {"AutoModel": "modeling_evil.Evil"}}, "auto_map"),
        ({"attn_implementation": "evil/attention"}, "attn_implementation"),
        ({"_attn_implementation": "kernels-community/evil:run"}, "_attn_implementation"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"dim_mult": [1] * 10**5, "num_layers": 10**6}, "config.json"),
    ],
)
@pytest.mark.parametrize("kind", ["text encoder", "VAE"])
def test_code_that_a_folder_names_is_not_run(
    config: dict[str, Any], named: str, kind: str, tmp_path: Path, bait: int
) -> None:
    if kind == "VAE":
        config = {"num_res_blocks" if key == "num_layers" else key: value for key, value in config.items()}
        named = named.replace("num_layers", "num_res_blocks")
    folder = _folder(tmp_path / "folder", **config)
    with pytest.raises(WeightsError, match=rf"{folder} .*{named}"):
        mapped_text_encoder(folder) if kind == "text encoder" else mapped_vae(folder)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}}, "auto_map"),
        ("config.json", {"auto_map": {"AutoConfig": "modeling_evil.Evil"}}, "auto_map"),
        ("tokenizer_config.json", {"chat_template": "{{ ''.__class__ }}"}, "chat_template"),
        ("chat_template.jinja", {"a": "{{ cycler.__init__ }}"}, "chat template"),
        ("tokenizer_config.json", {"tokenizer_class": "TransfoXLTokenizer"}, "TransfoXLTokenizer"),
        ("tokenizer_config.json", {"tokenizer_class": ["T5Tokenizer"]}, "tokenizer_class"),
        ("config.json", {"model_type": "rag"}, "rag"),
    ],
)
def test_code_of_a_tokenizer_is_not_run(file: str, content: object, named: str, tmp_path: Path, bait: int) -> None:
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "modeling_evil.py").write_text(f"open('{MARKER}', 'w')\n", encoding="utf-8")
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(WeightsError, match=rf"no tokenizer in {tmp_path}: .*{named}"):
        load_tokenizer(tmp_path, 8)

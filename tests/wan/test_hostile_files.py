"""Weight files that try to act: every one is refused by name, and nothing that they bring is run."""

from __future__ import annotations

import copyreg
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.scoring.vbench_long.official import OFFICIAL
from lrag_ray.scoring.vbench_long.weights import WeightFiles
from lrag_ray.wan import tokenizer_process
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.wan.text import load_tokenizer, mapped_text_encoder
from lrag_ray.wan.vae import mapped_vae
from tests.wan.torch_files import older, text, zipped

MARKER = "acted"


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


def test_a_tokenizer_that_takes_gigabytes_is_refused_and_a_chain_of_replacements_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_process, "MOST_BYTES", 1 << 28)
    kept: dict[str, Any] = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    kept |= {
        "post_processor": None,
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0]]},
    }
    doubled = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    chain = kept | {"normalizer": {"type": "Sequence", "normalizers": [doubled] * 40}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(chain), encoding="utf-8")
    tokenize, _ = load_tokenizer(tmp_path, 8)
    assert tokenize("b") == [0]
    monkeypatch.setattr(tokenizer_process, "ENCODE_S", 0.5)
    with pytest.raises(WeightsError, match=rf"no tokenizer in {tmp_path}: it takes more than 0.5 s, .* Fix: "):
        tokenize("a")
    pieces = [["<unk>", 0], *([chr(0x4E00 + first) * 20_000, 0] for first in range(20))]
    long = kept | {"model": kept["model"] | {"vocab": pieces}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(long, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(WeightsError, match=rf"no tokenizer in {tmp_path}: it takes more than 0.25 GiB of memory"):
        load_tokenizer(tmp_path, 8)


@pytest.mark.parametrize("file", ["special_tokens_map.json", "added_tokens.json", "spiece.model"])
def test_pipes_and_endless_files_beside_a_tokenizer_are_not_opened(file: str, tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    os.mkfifo(tmp_path / file)
    with pytest.raises(WeightsError, match=rf"no tokenizer in {tmp_path}: {file} is a pipe, a socket or a device"):
        load_tokenizer(tmp_path, 8)
    (tmp_path / file).unlink()
    with (tmp_path / file).open("wb") as large:
        large.truncate(1 << 40)
    with pytest.raises(WeightsError, match=f"{file} has 1,099,511,627,776 bytes, and such files at most"):
        load_tokenizer(tmp_path, 8)

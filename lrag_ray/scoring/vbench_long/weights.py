"""The official weight files of every network: what they are called, where they are looked for, how they are read.

Nothing is downloaded here. A folder is laid out as VBench's own cache, so that an existing ``~/.cache/vbench`` serves
as it is; without a folder the caches of VBench, torch.hub, CLIP and DreamSim are searched as well.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from lrag_ray.errors import WeightsError
from lrag_ray.wan.state_dict import read_checkpoint

NetworkName = Literal[
    "dino_vitb16",
    "dinov2_vitb14",
    "clip_vitb32",
    "clip_vitl14",
    "laion_linear",
    "raft_things",
    "amt_s",
    "musiq_spaq",
    "dreamsim_clip_vitb16",
    "dreamsim_open_clip_vitb16",
    "dreamsim_ensemble_lora",
]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)


class OfficialFile(NamedTuple):
    """A published weight file."""

    path: str
    """Place in a weights folder."""
    url: str
    """Where it is published; an archive where `member` is set."""
    member: str = ""
    """Path inside the archive."""
    elsewhere: str = ""
    """Place below ``~/.cache`` where another tool leaves it."""


_DREAMSIM = (
    "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/dreamsim_ensemble_checkpoint.zip"
)
_OPENAI = "https://openaipublic.azureedge.net/clip/models"

OFFICIAL: Mapping[NetworkName, OfficialFile] = {
    "dino_vitb16": OfficialFile(
        "dino_model/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        elsewhere="torch/hub/checkpoints/dino_vitbase16_pretrain.pth",
    ),
    "dinov2_vitb14": OfficialFile(
        "dinov2_model/dinov2_vitb14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        elsewhere="torch/hub/checkpoints/dinov2_vitb14_pretrain.pth",
    ),
    "clip_vitb32": OfficialFile(
        "clip_model/ViT-B-32.pt",
        f"{_OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        elsewhere="clip/ViT-B-32.pt",
    ),
    "clip_vitl14": OfficialFile(
        "clip_model/ViT-L-14.pt",
        f"{_OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        elsewhere="clip/ViT-L-14.pt",
    ),
    "laion_linear": OfficialFile(
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
    ),
    "raft_things": OfficialFile(
        "raft_model/models/raft-things.pth",
        "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        member="models/raft-things.pth",
    ),
    "amt_s": OfficialFile("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth"),
    "musiq_spaq": OfficialFile(
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    ),
    "dreamsim_clip_vitb16": OfficialFile(
        "dreamsim_model/clip_vitb16_pretrain.pth.tar",
        _DREAMSIM,
        member="clip_vitb16_pretrain.pth.tar",
        elsewhere="clip_vitb16_pretrain.pth.tar",
    ),
    "dreamsim_open_clip_vitb16": OfficialFile(
        "dreamsim_model/open_clip_vitb16_pretrain.pth.tar",
        _DREAMSIM,
        member="open_clip_vitb16_pretrain.pth.tar",
        elsewhere="open_clip_vitb16_pretrain.pth.tar",
    ),
    "dreamsim_ensemble_lora": OfficialFile(
        "dreamsim_model/ensemble_lora", _DREAMSIM, member="ensemble_lora/", elsewhere="ensemble_lora"
    ),
}
"""One file (for the LoRA a folder with ``adapter_model.*`` and ``adapter_config.json``) per network."""


@dataclass(frozen=True)
class Weights:
    """The tensors of one network under their official names."""

    tensors: Mapping[str, Tensor]
    lora_scale: float = 1.0
    """alpha / rank, for a LoRA."""


class WeightSource(Protocol):
    """Where networks get their weights: official files, or the recipe of the conformance vectors."""

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        """Weights of a network whose official names and shapes are those of `expected` (meta tensors)."""
        ...


@dataclass(frozen=True)
class WeightFiles:
    """Official files in `folder`, or in the usual caches where it is None."""

    folder: Path | None = None

    def places(self, name: NetworkName) -> list[Path]:
        """Where the file of a network is looked for, in order."""
        official = OFFICIAL[name]
        if self.folder is not None:
            return [self.folder / official.path]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        vbench = Path(os.environ.get("VBENCH_CACHE_DIR") or cache / "vbench")
        return [vbench / official.path, *([cache / official.elsewhere] if official.elsewhere else [])]

    def find(self, name: NetworkName) -> Path:
        """The file of a network.

        Raises:
            WeightsError: it is in none of its places; names them and the source.
        """
        places = self.places(name)
        for place in places:
            if place.exists():
                return place
        official = OFFICIAL[name]
        tried = " and ".join(str(place) for place in places)
        inside = f" (in the archive: {official.member})" if official.member else ""
        raise WeightsError(
            f"no weights for {name}: nothing at {tried}. Mend: lrag-ray weights pull --suite vbench_long, "
            f"or put {official.url}{inside} there"
        )

    def missing(self) -> Iterator[NetworkName]:
        """Networks whose file is in none of its places."""
        for name in NETWORKS:
            if not any(place.exists() for place in self.places(name)):
                yield name

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        """Tensors of the official file, unwrapped and without prefixes; CLIP's text tower is left out."""
        path = self.find(name)
        if name == "dreamsim_ensemble_lora":
            return _read_lora(path)
        tensors = _unwrap(_read_torchscript(path) if _is_torchscript(path) else read_checkpoint(path))
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        if name in ("clip_vitb32", "clip_vitl14"):
            tensors = {key: value for key, value in tensors.items() if key in expected}
        return Weights({key: _as_float32(value) for key, value in tensors.items()})


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _unwrap(content: dict[str, Any]) -> dict[str, Any]:
    """The state dict inside a checkpoint that also holds other things."""
    for key in ("state_dict", "params"):
        if isinstance(content.get(key), dict):
            return dict(content[key])
    return content


def _is_torchscript(path: Path) -> bool:
    """The OpenAI CLIP files are TorchScript archives, which hold code beside the tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> dict[str, Any]:
    """Tensors of a TorchScript archive; its code is parsed but never called."""
    try:
        with warnings.catch_warnings():
            # torch announces the end of TorchScript; OpenAI publishes CLIP in no other form.
            warnings.simplefilter("ignore", DeprecationWarning)
            module: Any = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise WeightsError(
            f"{path} is a TorchScript archive that cannot be read: {error}. Mend: fetch it again"
        ) from error
    return dict(module.state_dict())


def _read_lora(folder: Path) -> Weights:
    config_path = folder / "adapter_config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(
            f"{config_path} does not say r and lora_alpha ({error}). Mend: unpack DreamSim's ensemble_lora again"
        ) from error
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((file for file in files if file.is_file()), files[0])
    return Weights({key: _as_float32(value) for key, value in read_checkpoint(path).items()}, scale)

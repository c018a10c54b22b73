from __future__ import annotations

import json
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.scoring.vbench_long import networks as networks_module
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NETWORKS, OFFICIAL, NetworkName
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.scoring.vbench_long.weights import WeightFiles, Weights


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_file_is_named_with_its_place_and_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        WeightFiles(tmp_path).read(name, {})  # type: ignore[arg-type]
    official = OFFICIAL[name]  # type: ignore[index]
    for part in (name, str(tmp_path / official.path), official.url, official.member, "Fix"):
        assert part in str(error.value)


def test_a_folder_is_searched_alone_and_without_one_the_usual_caches_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VBENCH_CACHE_DIR", raising=False)
    hub = tmp_path / "cache/torch/hub/checkpoints/dino_vitbase16_pretrain.pth"
    hub.parent.mkdir(parents=True)
    hub.touch()
    assert WeightFiles().find("dino_vitb16") == hub
    assert set(WeightFiles().missing()) == set(NETWORKS) - {"dino_vitb16"}
    assert set(WeightFiles(tmp_path / "offline").missing()) == set(NETWORKS)


class _Nested(nn.Module):
    """A module whose state dict has the given names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                inner.setdefault(head, {})[rest] = tensor
            else:
                self.register_buffer(name, tensor)
        for head, below in inner.items():
            self.add_module(head, _Nested(below))

    def forward(self, x: Tensor) -> Tensor:
        return x


def _torchscript(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As OpenAI publishes CLIP: traced, half precision, the text tower and some numbers beside the image tower."""
    other = {"token_embedding.weight": torch.zeros(4, 2).half(), "input_resolution": torch.tensor(224)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = _Nested({**{name: tensor.half() for name, tensor in tensors.items()}, **other})
        torch.jit.save(torch.jit.trace(module, torch.zeros(1)), path)


def _saved(wrap: Callable[[dict[str, Tensor]], object]) -> Callable[[Mapping[str, Tensor], Path], None]:
    return lambda tensors, path: torch.save(wrap(dict(tensors)), path)


def _lora(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 8}), encoding="utf-8")
    save_file(dict(tensors), path / "adapter_model.safetensors")


PLAIN = _saved(lambda tensors: tensors)
FORMATS: dict[str, Callable[[Mapping[str, Tensor], Path], None]] = {
    "dino_vitb16": PLAIN,
    "dinov2_vitb14": PLAIN,
    "clip_vitb32": _torchscript,
    "clip_vitl14": _torchscript,
    "laion_linear": PLAIN,
    "raft_things": _saved(lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()}),
    # AMT's training made its checkpoint with typing's OrderedDict, whose mark stays in the file.
    "amt_s": _saved(lambda tensors: typing.OrderedDict(epoch=300, state_dict=tensors)),
    "musiq_spaq": _saved(lambda tensors: {"params": tensors}),
    "dreamsim_clip_vitb16": _saved(lambda tensors: {"state_dict": tensors}),
    "dreamsim_open_clip_vitb16": _saved(lambda tensors: {"state_dict": tensors}),
    "dreamsim_ensemble_lora": _lora,
}
"""How each official file is made."""


class _Published(RandomWeights):
    """The recipe, which also writes every network as its official file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        weights = super().read(name, expected)
        path = self.folder / OFFICIAL[name].path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            FORMATS[name](weights.tensors, path)
        return weights


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vision transformers of one block, whose files are small."""
    for name in ("DINO", "DINOV2", "CLIP_B32", "CLIP_L14", "DREAMSIM_DINO", "DREAMSIM_CLIP", "DREAMSIM_OPEN_CLIP"):
        monkeypatch.setattr(networks_module, name, replace(getattr(networks_module, name), depth=1))


@pytest.mark.parametrize(
    "network", ["dino", "dinov2", "clip_b32", "clip_l14", "aesthetic_head", "raft", "amt", "musiq", "dreamsim"]
)
def test_every_official_format_is_read(network: str, shallow: None, tmp_path: Path) -> None:
    recipe, official = Networks(_Published(tmp_path)), Networks(WeightFiles(tmp_path))
    made, read = (getattr(networks, network) for networks in (recipe, official))
    assert official.digests == recipe.digests
    if network == "dreamsim":
        image = torch.rand(1, 3, 224, 224)
        with official.numerics():
            assert torch.equal(made(image), read(image))


@pytest.mark.parametrize("name", ["clip_vitb32", "amt_s", "laion_linear", "dreamsim_ensemble_lora"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other"])
def test_a_damaged_file_is_told_with_its_place_and_fix(name: NetworkName, damage: str, tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL[name].path
    path.parent.mkdir(parents=True)
    FORMATS[name]({"visual.proj" if name == "clip_vitb32" else "weight": torch.rand(64, 64)}, path)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()
    if damage == "other":
        torch.save({"epoch": 3, "weight": "none"}, file)
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "text": b"<html>not found</html>" * 9, "empty": b""}[damage])
    if damage == "other" and name == "clip_vitb32":
        assert not WeightFiles(tmp_path).read(name, {}).tensors, "the model then says what is missing"
        return
    with pytest.raises(WeightsError) as told:
        WeightFiles(tmp_path).read(name, {})
    for part in (name, str(path), "Fix"):
        assert part in str(told.value)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL["laion_linear"].path
    path.parent.mkdir(parents=True)
    torch.save({"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, path)
    with pytest.raises(
        WeightsError, match=r"weights of laion_linear\) does not fit(.|\n)*\[1, 512\], expected \[1, 768\]"
    ):
        _ = Networks(WeightFiles(tmp_path)).aesthetic_head


def test_clip_is_read_without_its_text_tower(tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL["clip_vitb32"].path
    path.parent.mkdir(parents=True)
    made = torch.rand(3, 2).half().float()
    _torchscript({"visual.proj": made}, path)
    weights = WeightFiles(tmp_path).read("clip_vitb32", {"visual.proj": torch.empty(3, 2)})
    assert weights.tensors.keys() == {"visual.proj"}
    assert torch.equal(weights.tensors["visual.proj"], made)


def test_the_lora_brings_its_own_scale(tmp_path: Path) -> None:
    folder = tmp_path / OFFICIAL["dreamsim_ensemble_lora"].path
    folder.mkdir(parents=True)
    files = WeightFiles(tmp_path)
    with pytest.raises(WeightsError, match="does not say r and lora_alpha"):
        files.read("dreamsim_ensemble_lora", {})
    (folder / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 8}), encoding="utf-8")
    save_file({"a.lora_A.weight": torch.ones(16, 4)}, folder / "adapter_model.safetensors")
    weights = files.read("dreamsim_ensemble_lora", {})
    assert weights.lora_scale == 0.5
    assert weights.tensors["a.lora_A.weight"].shape == (16, 4)

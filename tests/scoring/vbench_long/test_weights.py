from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.scoring.vbench_long import NETWORKS, OFFICIAL, Networks, RandomWeights, WeightFiles


def _drawn(name: str) -> dict[str, Tensor]:
    """The recipe's tensors of a network, under their official names."""
    kept: dict[str, Tensor] = {}

    class Keep(RandomWeights):
        def read(self, network, expected):  # type: ignore[no-untyped-def]
            weights = super().read(network, expected)
            kept.update(weights.tensors)
            return weights

    getattr(Networks(Keep()), name)
    return kept


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_file_is_named_with_its_place_and_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        WeightFiles(tmp_path).read(name, {})  # type: ignore[arg-type]
    official = OFFICIAL[name]  # type: ignore[index]
    for part in (name, str(tmp_path / official.path), official.url, official.member, "Mend"):
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


def test_official_wrappings_are_taken_off(tmp_path: Path) -> None:
    """RAFT's file has a prefix, AMT's and MUSIQ's nest the state dict."""
    for attribute, name, wrap in (
        ("raft", "raft_things", lambda t: {f"module.{key}": value for key, value in t.items()}),
        ("amt", "amt_s", lambda t: {"epoch": 300, "state_dict": t}),
        ("aesthetic_head", "laion_linear", lambda t: t),
    ):
        path = tmp_path / OFFICIAL[name].path  # type: ignore[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = _drawn(attribute)
        torch.save(wrap(tensors), path)  # type: ignore[no-untyped-call]
        official, recipe = Networks(WeightFiles(tmp_path)), Networks(RandomWeights())
        getattr(official, attribute)
        getattr(recipe, attribute)
        assert official.digests == recipe.digests


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL["laion_linear"].path
    path.parent.mkdir(parents=True)
    torch.save({"weight": torch.zeros(1, 512), "bias": torch.zeros(1)}, path)  # type: ignore[no-untyped-call]
    with pytest.raises(WeightsError, match=r"weights of laion_linear\) does not fit(.|\n)*\[1, 512\], expected \[1, 768\]"):
        _ = Networks(WeightFiles(tmp_path)).aesthetic_head


class _Archive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(2, 3)
        self.token_embedding = nn.Embedding(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.visual(x)
        return out


def test_clip_is_read_from_its_torchscript_archive_without_the_text_tower(tmp_path: Path) -> None:
    model = _Archive().half()
    path = tmp_path / OFFICIAL["clip_vitb32"].path
    path.parent.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), path)  # type: ignore[no-untyped-call]
    expected = {"visual.weight": torch.empty(3, 2), "visual.bias": torch.empty(3)}
    weights = WeightFiles(tmp_path).read("clip_vitb32", expected)
    assert weights.tensors.keys() == expected.keys()
    assert torch.equal(weights.tensors["visual.weight"], model.visual.weight.detach().float())


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

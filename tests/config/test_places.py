"""Where a configuration's files are looked for, and what its weights are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.config.load import load_config
from lrag_ray.errors import ConfigError
from tests.config.make import SMALL, write


def test_files_beside_the_configuration_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given relative paths and another working directory: what is beside the configuration is named with the fix."""
    there, here = tmp_path / "the configs", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / "prompts.txt").write_text("a fox\n")
    (there / "ae.pt").write_bytes(b"x")
    path = write(there, SMALL.replace("descriptor: avg_pool", "encoder: ae.pt"))
    monkeypatch.chdir(there)
    load_config(path)
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError) as caught:
        load_config("../the configs/run.yaml")
    assert str(caught.value).split("\n  ")[1:] == [
        "../the configs/run.yaml:3: prompts.path: 'prompts.txt' is not in the working directory but beside the "
        "configuration, and relative paths mean the working directory. Fix: run lrag-ray in '../the configs', or "
        "--set 'prompts.path=../the configs/prompts.txt'",
        "../the configs/run.yaml:9: methods.rag.encoder: 'ae.pt' is not in the working directory but beside the "
        "configuration, and relative paths mean the working directory. Fix: run lrag-ray in '../the configs', or "
        "--set 'methods.rag.encoder=../the configs/ae.pt'",
    ]
    (here / "prompts.txt").write_text("a bear\n")
    config = load_config("../the configs/run.yaml", ["methods.rag.encoder=../the configs/ae.pt"])
    assert config.prompts.path == "prompts.txt"
    # What is in neither place is reported where it is read, and a run's own address is only ever made.
    (here / "prompts.txt").unlink()
    (there / "prompts.txt").unlink()
    assert load_config("../the configs/run.yaml", ["methods.rag.encoder=../the configs/ae.pt"])


def test_a_configuration_of_a_project_says_where_its_paths_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given paths that begin two folders above the configuration, and a run from elsewhere."""
    configs, here = tmp_path / "my project" / "configs" / "small", tmp_path / "here"
    configs.mkdir(parents=True)
    here.mkdir()
    (tmp_path / "my project" / "prompts.txt").write_text("a fox\n")
    write(configs, SMALL)
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError) as caught:
        load_config("../my project/configs/small/run.yaml")
    project = tmp_path / "my project"
    assert (
        f"prompts.path: 'prompts.txt' is not in the working directory but in {project}, and relative paths mean the "
        f"working directory. Fix: run lrag-ray in '{project}', or --set 'prompts.path={project}/prompts.txt'"
    ) in str(caught.value)
    monkeypatch.chdir(project)
    assert load_config("configs/small/run.yaml").prompts.path == "prompts.txt"


@pytest.mark.parametrize(
    ("override", "label"),
    [
        ("weights.use_ema=false", "LongLive"),
        ("weights.path=elsewhere/longlive_base.pt", "LongLive"),
        ("weights.path=mine/tuned.pt", "own weights tuned.pt, sizes of LongLive"),
        ("weights.lora.path=mine/style.pt", "LongLive, own LoRA style.pt"),
        ("weights.lora=null", "LongLive, without LoRA"),
        ("label=Ours", "Ours"),
    ],
)
def test_weights_of_your_own_do_not_carry_the_label_of_published_ones(
    tmp_path: Path, override: str, label: str
) -> None:
    (tmp_path / "run.yaml").write_text(
        "run: {uri: runs/x}\nprompts: {count: 1}\nbackbones: {mine: {preset: longlive}}\n"
        "methods: {base: {method: base}}\ndurations_s: [3]\n"
    )
    config = load_config(tmp_path / "run.yaml", [f"backbones.mine.{override}"])
    assert config.backbones["mine"].label == label

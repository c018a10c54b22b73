"""Weight files of strangers through the commands: a message with file and fix, and nothing that they bring is run.

Each attack meets one slot of a configuration and one command here; readers meet every kind in tests/wan.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import lrag_ray.cli.app as cli
from lrag_ray.errors import WeightsError
from tests.cli.hostile_weights import ATTACKS, make
from tests.config.make import SMALL

SLOTS: dict[str, dict[str, Any]] = {
    "generator": {"weights": {"path": "weights.pt"}},
    "LoRA": {"weights": {"random_seed": 0, "lora": {"path": "weights.pt"}}},
    "VAE": {"vae": {"kind": "wan", "path": "weights.pt"}},
    "text encoder": {"text_encoder": {"kind": "umt5", "path": "weights.pt", "tokenizer": "weights.pt"}},
    "retrieval encoder": {},
}
COMMANDS = (["weights", "verify"], ["run"])
QUICK = [attack for attack in ATTACKS if attack not in ("bomb of a pickle", "30,000 tensors", "sparse archive")]
"""The others take as many steps as a pickle may have, which are some seconds."""


def configuration(slot: str) -> str:
    config = yaml.safe_load(SMALL)
    config["backbones"]["tiny"] |= SLOTS[slot]
    if slot == "retrieval encoder":
        config["methods"]["rag"] = {"descriptor": "ae", "encoder": "weights.pt"}
    written: str = yaml.safe_dump(config)
    return written


MEETINGS = [*zip(QUICK, cycle(SLOTS), cycle(COMMANDS), strict=False)]


@pytest.mark.parametrize(("attack", "slot", "command"), MEETINGS)
def test_a_file_that_is_no_network_is_refused_by_name(
    attack: str, slot: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("prompts.txt").write_text("a fox\n")
    Path("run.yaml").write_text(configuration(slot))
    make(attack, Path("weights.pt"))
    shown = CliRunner().invoke(cli.app, [*command, "run.yaml"])
    assert isinstance(shown.exception, SystemExit), shown.exception
    assert shown.exit_code == WeightsError.exit_code
    assert "weights.pt" in shown.output and "Fix: " in shown.output
    assert len(shown.output) < 5000 and "\x1b" not in shown.output
    # The run's own folder is there before its weights are looked at.
    assert {path.name for path in Path().iterdir()} <= {"prompts.txt", "run.yaml", "weights.pt", "cache", "runs"}

"""The worked examples of lrag_ray/context/README.md, run from outside the package as their reader would."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import lrag_ray.context
from lrag_ray.cli import weights as cli
from lrag_ray.config.load import load_config
from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.schema import RunConfig
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.registry import policy_class
from lrag_ray.context.trace import TraceRow
from lrag_ray.context.weights import WeightFile
from lrag_ray.errors import ConfigError, WeightsError
from lrag_ray.pipelines.doctor import examine
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.plan import make_plan
from lrag_ray.stages.rollout.worker import RolloutResult, RolloutStage
from lrag_ray.stages.spec import LocalHost
from lrag_ray.store.records import new_attempt_id
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.weights.verify import refuse_misfits
from tests.stages.make import BACKBONE, encode_texts, make_prompts, pending_tasks
from tests.tiny import LATENT, generate, start, tiny_transformer

GUIDE = Path(lrag_ray.context.__file__).with_name("README.md")
CPU = torch.device("cpu")
PROMPTS = make_prompts("a red fox in the snow")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the module that a reader saves, in a folder that is not the package's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "my_methods.py").write_text("\n".join(code), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield "my_methods"
    sys.modules.pop("my_methods", None)


@pytest.fixture
def every_other(module: str) -> type[ContextPolicy[Any]]:
    return policy_class(f"{module}:EveryOther")


@pytest.fixture
def recall(module: str) -> type[ContextPolicy[Any]]:
    return policy_class(f"{module}:Recall")


def projection(seed: int) -> dict[str, Tensor]:
    return {"projection": torch.randn(3, LATENT[0], generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def config_file(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of base and of the reader's method, whose weights are named relative to the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0].text}\n")
    save_file(projection(0), tmp_path / "weights" / "projection.safetensors")
    own = {"window": 8, "recalled": 2, "projection": "weights/projection.safetensors"}
    text = {
        "run": {"uri": str(tmp_path / "run")},
        "prompts": {"path": str(tmp_path / "prompts.txt")},
        "durations_s": [3, 6],
        "backbones": {"tiny": BACKBONE},
        "methods": {"base": {"window": 8}, "recall": {"method": f"{module}:Recall", **own}},
        "engine": {"actors": 1, "gpus_per_actor": 0},
        "video": {"enabled": False},
        "scoring": {"suite": "none"},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(text), encoding="utf-8")
    return file


def frames_of(trace: list[TraceRow], kind: str) -> list[int]:
    return [row.frame for row in trace if row.kind == kind]


def test_it_attends_to_every_second_cached_frame(every_other: type[ContextPolicy[Any]]) -> None:
    results = list(start(tiny_transformer(), every_other).blocks(8))
    rows = [(row.kind, row.frame, row.temporal_index) for row in results[7].trace[0]]
    local = [("local", frame, 1 + i) for i, frame in enumerate((14, 16, 18, 20))]
    assert rows == [("sink", 0, 0), *local, *[("current", 21 + i, 5 + i) for i in range(3)]]


def test_its_settings_are_checked(every_other: Any) -> None:
    with pytest.raises(ValueError, match="stride 0 must be at least 1"):
        every_other.Settings(stride=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("EveryOther", {"stride": 3, "window": 14}), ("Recall", {"window": 8}), ("Recall", {"window": 7, "recalled": 3})],
)
def test_they_keep_their_promises(module: str, name: str, settings: dict[str, Any]) -> None:
    """Shorter rollouts are prefixes, and replay continues with the same bits."""
    policy = policy_class(f"{module}:{name}")
    model, own = tiny_transformer(), policy.Settings(**settings)
    whole = generate(start(model, policy, own, weights={"projection": projection(0)}), 8)
    assert torch.equal(generate(start(model, policy, own, weights={"projection": projection(0)}), 5), whole[:, :15])
    resumed = start(model, policy, own, weights={"projection": projection(0)})
    resumed.replay(whole[:, :15])
    assert torch.equal(generate(resumed, 3), whole[:, 15:])


def test_it_recalls_the_frames_nearest_under_its_projection(recall: Any) -> None:
    """Given window 8 and sink 1, the history before block b is 1 .. 3b-5, of which block b-1 could see all but 3."""
    settings = recall.Settings(window=8)
    rollout = start(tiny_transformer(), recall, settings, weights={"projection": projection(0)})
    results = list(rollout.blocks(9))
    pooled = torch.cat([result.latents for result in results], dim=1)[0].mean(dim=(-2, -1))
    descriptors = pooled @ projection(0)["projection"].T
    for result in results:
        newest = result.first_frame - 1
        held = max(0, result.first_frame - 8)
        near = torch.cosine_similarity(descriptors[1 : 1 + held], descriptors[newest][None], dim=-1)
        best = (near.argsort(descending=True)[:2] + 1).tolist() if held else []
        assert frames_of(result.trace[0], "retrieved") == best
        assert sum(row.tokens for row in result.trace[0]) <= 8 * rollout.context.layout.tokens_per_frame
    bank = rollout.context.policies[0].bank  # type: ignore[attr-defined]
    bytes_per_frame = 2 * 2 * rollout.context.layout.tokens_per_frame * 24 * 4
    assert bank.nbytes() == recall.history_frames(settings, 3, 27) * bytes_per_frame


def test_without_its_weights_a_rollout_is_refused(recall: type[ContextPolicy[Any]]) -> None:
    with pytest.raises(ValueError, match=r"weights\['projection'\] are not given to the rollout: name a projection"):
        start(tiny_transformer(), recall)


def test_its_configuration_is_checked(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"methods\.recall\.projection: is missing: name a projection \[D, C\]"):
        load_config(config_file, ["methods.recall.projection=null"])
    with pytest.raises(ConfigError, match=r"window 8 leaves 2 latent frames .* after sink 1 and recalled 5"):
        load_config(config_file, ["methods.recall.recalled=5"])
    with pytest.raises(ConfigError, match=r"methods\.recall\.projektion: unknown key; did you mean 'projection'"):
        load_config(config_file, ["methods.recall.projektion=x"])


def test_its_memory_and_its_notes_are_in_the_plan(config_file: Path) -> None:
    plan = make_plan(load_config(config_file), PROMPTS)
    base, own = plan.methods
    (backbone,) = plan.backbones
    assert own.history_bytes == (24 - 8) * backbone.kv_bytes_per_frame
    assert own.gpu_bytes - base.gpu_bytes == 2 * 2 * backbone.kv_bytes_per_frame
    assert not any("recall" in note for note in plan.notes)
    narrow = ["methods.recall.window=9", "methods.recall.recalled=5"]
    notes = make_plan(load_config(config_file, narrow), PROMPTS).notes
    assert "methods.recall: recalled 5 is more than half of the window" in notes


def resolved(config_file: Path) -> RunConfig:
    return with_absolute_paths(load_config(config_file))


def test_its_weights_are_part_of_the_identity(config_file: Path, tmp_path: Path) -> None:
    """Given another projection under the same name, the method's rollouts are other ones, and only they."""
    before = build_identity(resolved(config_file), PROMPTS)
    content = (tmp_path / "weights" / "projection.safetensors").read_bytes()
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(content)
    save_file(projection(1), tmp_path / "weights" / "projection.safetensors")
    after = build_identity(resolved(config_file), PROMPTS)
    elsewhere = build_identity(load_config(config_file, [f"methods.recall.projection={moved}"]), PROMPTS)

    assert before.methods["recall"].summary.startswith("Keeps the first and the newest frames, and recalls those")
    assert before.methods["base"].summary == ""
    settings = before.methods["recall"].settings
    assert set(settings["projection"]) == {"sha256"} and len(settings["projection"]["sha256"]) == 64
    for rollout in before.rollouts():
        assert (after.rollout_keys(rollout) == before.rollout_keys(rollout)) == (rollout.method == "base")
        assert elsewhere.rollout_keys(rollout) == before.rollout_keys(rollout)


def test_its_weights_are_listed_verified_and_asked_for_before_a_start(config_file: Path, tmp_path: Path) -> None:
    def told(command: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(cli.weights, [command, str(config_file), "--json"])
        ((row,),) = json.loads(done.stdout).values()
        return done.exit_code, row

    def doctor() -> tuple[str, str]:
        return next((row.state, row.found) for row in examine(load_config(config_file)) if "recall" in row.check)

    file = tmp_path / "weights" / "projection.safetensors"
    _, listed = told("list")
    assert (listed["kind"], listed["keys"]) == ("recall_projection", ["methods.recall.projection"])
    assert listed["present_bytes"] == file.stat().st_size
    code, verified = told("verify")
    assert code == 0 and "1 tensor fits" in verified["detail"]
    assert doctor()[0] == "ok"
    refuse_misfits(load_config(config_file))

    save_file({"projection": torch.full((3, 16), torch.nan)}, file)
    code, verified = told("verify")
    assert code == 3 and "recall projection weights/projection.safetensors holds NaN" in verified["detail"]

    save_file({"matrix": torch.zeros(3, 16)}, file)
    expected = "holds ['matrix'], expected one matrix named projection"
    assert expected in told("verify")[1]["detail"]
    assert doctor()[0] == "fail" and expected in doctor()[1]
    with pytest.raises(WeightsError, match="expected one matrix named projection"):
        refuse_misfits(load_config(config_file))

    file.unlink()
    with pytest.raises(WeightsError, match=r"methods\.recall\.projection: nothing at weights/projection\.safetensors"):
        refuse_misfits(load_config(config_file))


def test_a_worker_runs_it(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given workers in another directory, they find the weights, and other weights make other videos."""
    digests = []
    (tmp_path / "worker").mkdir()
    for seed in (0, 1):
        save_file(projection(seed), tmp_path / "weights" / "projection.safetensors")
        config = with_absolute_paths(load_config(config_file, [f"run.uri={tmp_path / f'run{seed}'}"]))
        run = RolloutRun(config.run.uri)
        identity = run.ensure(build_identity(config, PROMPTS))
        (task,) = (task for task in pending_tasks(run, identity) if task.rollout.method == "recall")
        encode_texts(run, config, [task])
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path / "worker")
            result = RolloutStage.of(run, config).open(LocalHost()).work(task, new_attempt_id())
        assert isinstance(result, RolloutResult) and result.committed == (12, 24)
        digests.append([commit.latents_digest for commit in run.commits()])
    assert digests[0] != digests[1]


def test_what_a_loader_cannot_make_sense_of_is_reported_with_its_file(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "x.safetensors")
    file = WeightFile("adapter", "my_adapter", lambda path: {"a": read_checkpoint(path)["a"]})
    with pytest.raises(WeightsError, match=r"my adapter .*x\.safetensors cannot be loaded: KeyError: 'a'\. Fix: point"):
        file.read(tmp_path / "x.safetensors")


def test_a_default_address_counts_like_one_that_is_given(module: str, config_file: Path, tmp_path: Path) -> None:
    """Given settings whose address has a default, the file is resolved and identified without being named."""
    code = (
        "\n\n@dataclass(frozen=True)\nclass DefaultSettings(RecallSettings):\n"
        '    projection: str | None = "weights/projection.safetensors"\n'
        "\n\nclass Default(Recall):\n    Settings = DefaultSettings\n"
    )
    with (tmp_path / "elsewhere" / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(code)
    config = with_absolute_paths(load_config(config_file, [f"methods.recall={{method: '{module}:Default'}}"]))
    assert config.methods["recall"].settings == {"projection": str(tmp_path / "weights" / "projection.safetensors")}
    assert "sha256" in build_identity(config, PROMPTS).methods["recall"].settings["projection"]

"""The doctor on this very machine: real encodes, real storage, real files."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lrag_ray.cli import doctor as cli
from lrag_ray.cli.app import app
from lrag_ray.config.load import load_job
from lrag_ray.config.schema import RunConfig
from lrag_ray.pipelines.doctor import Row, examine, healthy
from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.training.checkpoint import checkpoint_bytes
from lrag_ray.training.loop import make_model
from tests.conftest import REPOSITORY
from tests.stages.make import BACKBONE, make_config
from tests.training.corpus import SHAPE, make_corpus, training_file


def rows_of(config: RunConfig | None) -> dict[str, Row]:
    return {row.check: row for row in examine(config)}


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("a red fox\n", encoding="utf-8")
    return {"path": str(tmp_path / "prompts.txt")}


def test_a_healthy_run_is_healthy_and_nothing_is_left_behind(tmp_path: Path, prompts: dict[str, Any]) -> None:
    run = tmp_path / "new" / "run"
    rows = rows_of(make_config(run, prompts=prompts, engine={"actors": 1}))
    assert healthy(list(rows.values())), rows
    assert set(rows) >= {"packages", "ray", "video codec", "prompts", "storage", "disk", "threads", "host memory"}
    assert not (tmp_path / "new").exists()


def test_video_works_without_an_ffmpeg_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ffmpeg") is None
    assert rows_of(None)["video codec"].state == "ok"


def test_missing_weights_say_what_to_put_where(tmp_path: Path, prompts: dict[str, Any]) -> None:
    absent = tmp_path / "self_forcing.pt"
    backbone = {**BACKBONE, "weights": {"path": str(absent), "use_ema": True}}
    rows = rows_of(make_config(tmp_path / "run", prompts=prompts, backbones={"sf": backbone}))
    assert rows["weights"].state == "fail" and "transformer" not in rows
    assert rows["weights"].found == f"1 published file missing (1 of unknown size): {absent}"
    assert rows["weights"].fix.startswith("lrag-ray weights pull CONFIG")

    torch.save({"generator_ema": {"model.head.head.bias": torch.zeros(64)}}, absent)
    rows = rows_of(make_config(tmp_path / "run", prompts=prompts, backbones={"sf": backbone}))
    assert "does not fit the model" in rows["transformer"].found


def test_networks_of_the_scoring_suite_are_looked_for(tmp_path: Path, prompts: dict[str, Any]) -> None:
    for weights, state in ((str(tmp_path), "fail"), ("random", "ok")):
        scoring = {"suite": "vbench_long", "weights": weights, "dimensions": ["imaging_quality"]}
        row = rows_of(make_config(tmp_path / "run", prompts=prompts, scoring=scoring))["scoring networks"]
        assert row.state == state and ("musiq_spaq" in row.found) == (state == "fail")


def test_storage_that_cannot_be_written_fails(tmp_path: Path, prompts: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    rows = rows_of(make_config(tmp_path / "file" / "run", prompts=prompts))
    assert rows["storage"].state == "fail" and "cannot write" in rows["storage"].found


def test_a_bucket_is_probed(s3_bucket: str, prompts: dict[str, Any], tmp_path: Path) -> None:
    rows = rows_of(make_config(f"{s3_bucket}/{tmp_path.name}", prompts=prompts))
    assert rows["storage"].state == "ok" and "honours create-only" in rows["storage"].found
    assert "disk" not in rows
    rows = rows_of(make_config("s3://no-such-bucket/run", prompts=prompts))
    assert rows["storage"].state == "fail"


def test_a_cluster_that_does_not_answer_fails(tmp_path: Path, prompts: dict[str, Any]) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert rows_of(make_config(tmp_path / "run", prompts=prompts, engine={"address": address}))["ray"].state == "ok"
    row = rows_of(make_config(tmp_path / "run", prompts=prompts, engine={"address": address}))["ray"]
    assert row.state == "fail" and "ray start --head" in row.fix


def test_what_a_run_would_refuse_of_ray_the_doctor_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, said in (
        ("ray://127.0.0.1:9991", "Ray Client address"),
        ("user:hunter2@10.0.0.1:6379", "holds user info"),
        ("http://10.0.0.1:8265", "is not a Ray address; expected auto, local or host:port"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        row = rows_of(None)["ray"]
        assert row.state == "fail" and said in row.found and "RAY_ADDRESS" in row.found
        assert "hunter2" not in row.found
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 110)))
    row = rows_of(None)["ray"]
    assert row.state == "fail" and "RAY_TMPDIR" in row.found and "such as /tmp" in row.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_asked_for_but_absent_fail(tmp_path: Path, prompts: dict[str, Any]) -> None:
    rows = rows_of(make_config(tmp_path / "run", prompts=prompts, engine={"gpus_per_actor": 1}))
    assert rows["gpu"].state == "fail" and "gpus_per_actor: 0" in rows["gpu"].fix
    assert rows_of(make_config(tmp_path / "run", prompts=prompts))["gpu"].state == "ok"


def test_what_the_plan_needs_is_held_against_the_machine(tmp_path: Path) -> None:
    """Given hours of full-size video with a history, disk, memory and threads of no machine suffice."""
    big = {**BACKBONE, "transformer": {}, "latent": {}, "dtype": "bfloat16"}
    rows = rows_of(
        make_config(
            tmp_path / "run",
            prompts={"count": 1_000_000},
            durations_s=[3600],
            backbones={"big": big},
            methods={"rag": {"method": "rag", "descriptor": "avg_pool"}},
            engine={"actors": 4096},
        )
    )
    assert [rows[check].state for check in ("prompts", "disk", "threads", "host memory")] == [
        "fail",
        "fail",
        "warn",
        "fail",
    ]


def test_command(tmp_path: Path) -> None:
    app = typer.Typer()
    cli.register(app)
    runner = CliRunner()
    demo = [str(REPOSITORY / "configs" / "demo.yaml"), "--set", f"run.uri={tmp_path / 'run'}"]
    found = ["--set", f"prompts.path={REPOSITORY / 'configs' / 'prompts' / 'demo.txt'}"]
    done = runner.invoke(app, [*demo, *found, "--json"])
    result = json.loads(done.stdout)
    assert (done.exit_code, result["healthy"]) == (0, True)
    lost = runner.invoke(app, [*demo, "--set", f"prompts.path={tmp_path / 'absent.txt'}"])
    assert lost.exit_code == 3 and "no such prompt file" in lost.stdout


def test_the_model_that_refines_is_looked_at_and_not_asked(
    tmp_path: Path, prompts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refine: dict[str, Any] = {"backend": "openai", "model": "m"}

    def row() -> Row:
        return rows_of(make_config(tmp_path / "run", prompts={**prompts, "refine": refine}))["prompt refinement"]

    assert row().state == "fail" and "OPENAI_API_KEY" in row().found
    refine["base_url"] = "http://127.0.0.1:9/v1"
    assert row() == Row("prompt refinement", "ok", "m (openai), template extend; the server was not asked")
    refine["template"] = str(tmp_path / "absent.txt")
    assert row().state == "fail" and "absent.txt" in row().found
    refine |= {"template": "extend", "backend": "local", "model": str(tmp_path / "no-model"), "base_url": None}
    assert row().state == "fail" and "no-model" in row().found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def training_rows(folder: Path, corpus: str, **changes: Any) -> dict[str, Row]:
    config = load_job(training_file(folder / "training.yaml", corpus, str(folder / "new" / "run"), **changes))
    return {row.check: row for row in examine(config)}


def test_a_training_is_examined_for_its_data_workers_and_memory(tmp_path: Path, corpus: str) -> None:
    rows = training_rows(tmp_path, corpus, engine={"actors": 1})
    assert healthy(list(rows.values())), rows
    assert {"dataset", "storage", "disk", "workers", "threads", "host memory"} <= rows.keys()
    assert not {"video codec", "prompts"} & rows.keys()
    assert "12 rollouts, 288 latent frames" in rows["dataset"].found and "steps per epoch" in rows["dataset"].found
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "check", "problem"),
    [
        ({"data": {"uris": ["nowhere"]}}, "dataset", "nowhere holds no dataset"),
        ({"data": {"window_frames": 30}}, "dataset", "shorter than data.window_frames 30"),
        ({"training": {"start_from": "absent.pt"}}, "start_from", "absent.pt cannot be read"),
        ({"engine": {"cpus_per_actor": 4096}}, "workers", "at least 2 with 4096 CPUs each"),
        ({"training": {"batch_size": 12}, "encoder": {"hidden_dims": [65_536], "latent_dim": 65_536}}, "host memory",
         "activations"),
    ],
)  # fmt: skip
def test_what_a_training_would_fail_on_is_found(
    tmp_path: Path, corpus: str, changes: dict[str, Any], check: str, problem: str
) -> None:
    rows = training_rows(tmp_path, corpus, **changes)
    assert rows[check].state == "fail" and problem in rows[check].found, rows


def test_a_training_that_another_run_is_in_the_way_of_is_told_so(tmp_path: Path, corpus: str) -> None:
    rows = training_rows(tmp_path, corpus, run={"uri": corpus})
    assert rows["run"].state == "fail" and "is not an encoder training" in rows["run"].found
    assert rows["dataset"].state == "ok"


def test_the_commands_of_weights_take_a_training(tmp_path: Path, corpus: str) -> None:
    path = str(training_file(tmp_path / "training.yaml", corpus, str(tmp_path / "run")))
    shown = CliRunner().invoke(app, ["weights", "list", path])
    assert (shown.exit_code, "begins with random weights" in shown.output) == (0, True)
    sizes = EncoderConfig(*SHAPE, 16, (8, 16))
    content = {"config": {**asdict(sizes), "hidden_dims": [8, 16]}, "model": make_model(sizes, 0).state_dict()}
    (tmp_path / "encoder.pt").write_bytes(checkpoint_bytes(content))
    for name, code in (("encoder.pt", 0), ("absent.pt", 3)):
        arguments = ["weights", "verify", path, "--set", f"training.start_from={tmp_path / name}", "--json"]
        shown = CliRunner().invoke(app, arguments)
        (row,) = json.loads(shown.output)["verified"]
        assert (shown.exit_code, row["kind"], row["ok"]) == (code, "retrieval_encoder", code == 0)

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import lrag_ray.cli.app as cli
from lrag_ray.errors import ClusterError
from lrag_ray.store.failures import write_failure
from lrag_ray.store.records import FailureRecord, now_utc
from lrag_ray.store.rollouts import RolloutRun
from tests.config.make import write
from tests.store.make import make_identity, rollout_id, store_commit

SURFACE = {
    "run": ["CONFIG", "--set", "--repair", "--progress", "--json"],
    "submit": [
        "CONFIG",
        "--address",
        "--follow",
        "--set",
        "--upload",
        "--python",
        "--progress",
        "--json",
    ],
    "jobs": ["--address", "--json"],
    "logs": ["ID|RUN", "--address", "--follow", "--progress", "--json"],
    "stop": ["ID|RUN", "--address", "--json"],
    "plan": [
        "CONFIG",
        "--set",
        "--gpus",
        "--gpu",
        "--price",
        "--node-memory-gb",
        "--gpu-memory-gb",
        "--rollouts-per-node",
        "--from",
        "--cells",
        "--json",
    ],
    "status": ["RUN", "--watch", "--json"],
    "verify": ["DIR", "--run", "--bytes", "--sample", "--bank", "--device", "--json"],
    "decode": ["RUN", "--config", "--set", "--other-vae", "--json"],
    "score": [
        "RUN|VIDEOS",
        "--suite",
        "--mode",
        "--weights",
        "--dimensions",
        "--manifest",
        "--to",
        "--config",
        "--set",
        "--json",
    ],
    "report": ["[LABEL=]RUN", "--to", "--suite", "--mode", "--strips", "--csv", "--latex", "--json"],
    "inspect rollout": ["ROLLOUT", "--png", "--json"],
    "inspect embeddings": [
        "RUN",
        "--descriptor",
        "--prompt",
        "--rollouts",
        "--to",
        "--window",
        "--sink",
        "--top-k",
        "--recent-exclude",
        "--frames-per-block",
        "--weights",
        "--json",
    ],
    "gc": ["RUN", "--remove", "--older-than", "--unfinished", "--json"],
    "doctor": ["CONFIG", "--set", "--json"],
    "weights list": ["CONFIG", "--suite", "--folder", "--set", "--json"],
    "weights pull": ["CONFIG", "--suite", "--folder", "--set", "--again", "--json"],
    "weights verify": ["CONFIG", "--suite", "--folder", "--set", "--digests", "--json"],
    "bench scoring": [
        "--video",
        "--weights",
        "--dimensions",
        "--official",
        "--device",
        "--batch-frames",
        "--batch-pairs",
        "--early-stop",
    ],
    "bench dataset": ["RUN…", "--rollouts", "--window", "--readers", "--windows", "--passes"],
    "dataset info": ["RUN…", "--json"],
    "dataset verify": ["RUN…", "--json"],
    "dataset export": ["RUN…", "--to", "--format", "--dtype", "--shard-mb", "--json"],
    "dataset import": ["DIR", "--to", "--window", "--licence", "--json"],
    "bench runner": ["--items", "--actors", "--seconds", "--address"],
    "bench decode": [None, "--backbone", "--run", "--limit", "--seconds", "--weights", "--device"],
    "bench rollout": [
        "CONFIG",
        "--backbone",
        "--method",
        "--compare",
        "--blocks",
        "--depth-s",
        "--prompts-per-pass",
        "--products",
        "--bank",
        "--bank-blocks",
        "--decode",
        "--device",
    ],
    "bench retrieval": ["--encoder", "--history", "--top-k", "--repeats", "--device"],
    "refine": ["CONFIG", "--to", "--set", "--progress", "--json"],
    "judge export": [
        "RUN",
        "--to",
        "--questions",
        "--cases",
        "--seed",
        "--duration",
        "--max-side",
        "--json",
    ],
    "judge import": ["RUN", "FILE", "--json"],
    "weights convert": ["CONFIG", "--to", "--set", "--json"],
    "import-config": ["FILE", "--to"],
    "runs": ["FOLDER", "--json"],
    "videos": ["RUN", "--prompt", "--method", "--backbone", "--duration", "--json"],
    "diff": ["RUN", "RUN", "--json"],
    "view": ["[LABEL=]RUN", "--port", "--browser", "--suite", "--mode", "--strips"],
    "export": [
        "[LABEL=]RUN... FILE.zip",
        "--prompt",
        "--method",
        "--limit",
        "--suite",
        "--mode",
        "--strips",
        "--json",
    ],
    "push": [
        "[LABEL=]RUN... hub://OWNER/NAME",
        "--public",
        "--prompt",
        "--method",
        "--limit",
        "--suite",
        "--mode",
        "--strips",
        "--json",
    ],
    "prompts": ["hub://OWNER/NAME[/FILE][@REVISION]", "FILE.jsonl", "--column", "--limit", "--json"],
    "init": ["CONFIG", "--uri", "--prompts", "--backbones", "--methods", "--durations", "--gpus"],
    "methods": ["--json"],
    "presets": ["--json"],
    "schema": [],
}


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Full names of all commands with their arguments and options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            parameters = [p.metavar if p.param_type_name == "argument" else p.opts[0] for p in command.params]
            yield f"{prefix}{name}", parameters


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def stored_run(tmp_path: Path) -> RolloutRun:
    """Two prompts, two horizons; one rollout is committed at both."""
    run, identity = RolloutRun(str(tmp_path / "run")), make_identity()
    run.ensure(identity)
    for frames in (6, 12):
        store_commit(run, identity, rollout_id(), frames)
    return run


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a fox\na bear\n")
    return write(tmp_path)


def test_the_public_surface_is_this() -> None:
    """Adding a command or an option is a change of the public surface: say so here. Removing one breaks scripts."""
    assert dict(commands(typer.main.get_command(cli.app))) == SURFACE


@pytest.mark.parametrize("command", SURFACE)
def test_every_command_has_an_example(command: str) -> None:
    shown = invoke(*command.split(), "--help")
    assert shown.exit_code == 0
    assert f"lrag-ray {command}" in shown.output.partition("Example")[2]


def test_help_is_quick_because_heavy_packages_wait() -> None:
    program = (
        "import sys, lrag_ray.cli.app; print([n for n in ('torch', 'ray', 'pyarrow', 'diffusers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_is_printed_as_tables_and_as_json(config: str) -> None:
    shown = invoke("plan", config)
    assert shown.exit_code == 0
    assert "tiny, untrained" in shown.stdout and re.search(r"total +4 +144 ", shown.stdout)
    as_json = json.loads(invoke("plan", config, "--json").stdout)
    assert as_json["totals"]["rollouts"] == 4
    assert as_json["cells"][0]["latent_frames"] == 18


def test_options_may_stand_anywhere_and_repeat(config: str) -> None:
    totals = json.loads(invoke("plan", "--set", "prompts.limit=1", config, "--json", "--set", "durations_s=[9]").stdout)
    assert totals["totals"]["rollouts"] == 2 and len(totals["cells"]) == 2


def test_a_wrong_configuration_exits_with_2_and_names_the_fix(config: str) -> None:
    shown = invoke("plan", config, "--set", "engine.actor=2")
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert shown.stderr == "error: --set engine.actor=2: engine.actor: unknown key; did you mean 'actors'?\n"


def test_errors_are_json_where_json_is_asked_for(config: str) -> None:
    shown = invoke("plan", config, "--json", "--set", "engine.actor=2")
    told = json.loads(shown.stderr)
    assert shown.exit_code == told["exit_code"] == 2
    assert (told["error"], shown.stdout) == ("ConfigError", "")
    assert told["message"].endswith("did you mean 'actors'?")


def test_a_run_without_prompts_exits_with_2_before_anything_starts(config: str) -> None:
    shown = invoke("run", config, "--set", "prompts={path: missing.txt, count: 128}")
    assert shown.exit_code == 2
    assert "missing.txt: no such prompt file" in shown.stderr and "moviegenbench_128_refined.txt" in shown.stderr
    assert not Path("runs").exists()


def test_an_address_that_cannot_be_written_exits_with_3(config: str) -> None:
    Path("file").write_text("in the way")
    shown = invoke("run", config, "--set", "run.uri=file/run")
    assert shown.exit_code == 3
    assert "file/run" in shown.stderr and "Traceback" not in shown.stderr


def test_wrong_usage_exits_with_2() -> None:
    assert invoke("plan").exit_code == 2
    assert invoke("plan", "a.yaml", "--sett", "x=1").exit_code == 2
    assert invoke("verify").exit_code == 2
    assert invoke("verify", "a", "--run", "b").exit_code == 2
    assert invoke("verify", "--run", "b", "--device", "cpu").exit_code == 2
    expanded = invoke("score", "a.mp4", "b.mp4")
    assert expanded.exit_code == 2 and "must be in quotes" in expanded.stderr


def test_status_reads_storage_alone(stored_run: RolloutRun) -> None:
    shown = invoke("status", stored_run.uri)
    assert shown.exit_code == 0 and "1.5 s" in shown.stdout
    status = json.loads(invoke("status", stored_run.uri, "--json").stdout)
    assert [(cell["done"], cell["total"]) for cell in status["cells"]] == [(1, 2), (1, 2)]
    assert status["done"] is False


def test_a_watched_status_looks_again_until_all_is_done(
    stored_run: RolloutRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def commit_the_rest(seconds: float) -> None:
        waits.append(seconds)
        for frames in (6, 12):
            store_commit(stored_run, stored_run.require(), rollout_id("00001-bb"), frames)

    monkeypatch.setattr("lrag_ray.cli.app.time.sleep", commit_the_rest)
    shown = invoke("status", stored_run.uri, "--watch", "--json")
    assert shown.exit_code == 0, shown.stderr
    first, second = (json.loads(text) for text in shown.stdout.replace("}\n{", "}\0{").split("\0"))
    assert (first["done"], second["done"]) == (False, True)
    assert len(waits) == 1 and waits[0] >= 5


def test_the_status_of_no_run_exits_with_3(tmp_path: Path) -> None:
    shown = invoke("status", str(tmp_path / "nothing"))
    assert shown.exit_code == 3 and "there is no run at this address" in shown.stderr


def test_records_of_strangers_cannot_steer_the_terminal(stored_run: RolloutRun) -> None:
    write_failure(
        stored_run.storage,
        FailureRecord(
            task=rollout_id("00001-bb").path,
            attempt="a",
            kind="exception",
            counted=True,
            counted_attempts=3,
            quarantined=True,
            reason="boom \x1b]0;owned\x07 [red]markup[/red]",
            traceback="",
            created_at=now_utc(),
        ),
    )
    shown = invoke("status", stored_run.uri).stdout
    assert "\x1b" not in shown and "\x07" not in shown
    assert "[red]markup[/red]" in shown


def test_verify_passes_and_fails_with_its_exit_code(golden: Path, tmp_path: Path) -> None:
    shown = invoke("verify", str(golden / "scheduler"))
    assert shown.exit_code == 0 and "0 fail" in shown.stdout
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in (golden / "scheduler").iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    description = wrong / "shift5.json"
    changed = json.loads(description.read_text())
    changed["shift"] = 4.0
    description.write_text(json.dumps(changed))
    told = invoke("verify", str(wrong), "--json")
    assert told.exit_code == 1
    result = json.loads(told.stdout)
    assert result["passed"] is False
    assert {row["case"] for row in result["results"] if row["status"] == "fail"} == {"shift5"}


def test_bugs_keep_their_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lrag_ray.pipelines.plan.make_plan", broken)
    shown = invoke("plan", config)
    assert isinstance(shown.exception, RuntimeError)


def test_exit_codes_follow_the_exception_tree(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise ClusterError("no cluster")

    monkeypatch.setattr("lrag_ray.pipelines.plan.make_plan", unreachable)
    assert invoke("plan", config).exit_code == 3


def test_jobs_where_no_cluster_is(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for arguments in (["submit", config], ["jobs"], ["logs", "runs/small"], ["stop", "runs/small"]):
        done = invoke(*arguments, "--address", "http://127.0.0.1:9")
        assert done.exit_code == 3
        assert "no Ray dashboard answers at http://127.0.0.1:9 (--address): connection refused" in done.stderr


def test_ctrl_c_exits_with_130() -> None:
    """A real process, interrupted while it waits for storage that has accepted its connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "lrag_ray", "status", "s3://bucket/run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **keys, "AWS_ENDPOINT_URL": endpoint},
        )
        connection, _ = silent.accept()
        with connection:
            time.sleep(0.2)
            process.send_signal(2)
            _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_a_job_is_the_same_command(config: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", config, "--set", "run.sed=1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 2
    assert "did you mean 'seed'?" in done.stderr

"""Hours of a plan from the timings of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lrag_ray.cli import app as cli
from lrag_ray.cli.plan import print_plan
from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import load_prompts, plan_prompts
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.plan import Plan, make_plan
from lrag_ray.pipelines.speeds import Speed, device_named, measured_speeds, speeds_for
from lrag_ray.store.records import Commit, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from tests.config.make import write

RATE = 2e9
"""Operations per second of the measured device."""


def commit(plan: Plan, rollout: RolloutId, frames: int, device: str, **timings_s: float) -> Commit:
    return Commit(
        rollout=rollout, rollout_key="", latent_frames=frames, attempt="a", latent_parts=[], trace_parts=[], video=None,
        video_frames=0, fps=16, latents_digest="", device_kind=device, versions={}, timings_s=timings_s,
        created_at=now_utc(),
    )  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Path, Plan]:
    """A configuration whose run has one rollout that took `RATE`, one that was resumed, and the plan without it."""
    (tmp_path / "prompts.txt").write_text("a fox\na bear\n")
    overrides = [f"prompts.path={tmp_path}/prompts.txt", f"run.uri={tmp_path}/run"]
    config = load_config(write(tmp_path), overrides)
    prompts = load_prompts(config.prompts)
    plan = make_plan(config, prompts)
    run = RolloutRun(config.run.uri)
    identity = run.ensure(build_identity(config, prompts))
    backbone, method = plan.methods[0].backbone, plan.methods[0].method
    first, second = (RolloutId(backbone=backbone, method=method, prompt_id=prompt) for prompt in identity.prompts)
    seconds = plan.methods[0].longest_flops / RATE
    frames = plan.methods[0].horizons[-1]
    decode = plan.methods[0].longest_decode_flops / (RATE / 2)
    device = "NVIDIA H100 80GB HBM3, torch 2.12.1, cuDNN 9"
    whole = commit(plan, first, frames, device, denoise=0.75 * seconds, context=0.25 * seconds, decode=decode)
    assert run.commit(whole)
    assert run.commit(commit(plan, second, frames, device, denoise=1e-6, context=1e-6, replay=1.0))
    return tmp_path, plan


def test_speed_is_operations_by_seconds_of_rollouts_made_in_one_go(measured: tuple[Path, Plan]) -> None:
    folder, _ = measured
    (speed,) = measured_speeds(RolloutRun(f"{folder}/run"))
    assert speed.rollouts == 1 and speed.device.startswith("NVIDIA H100")
    assert speed.generation_flops_per_s == pytest.approx(RATE)
    assert speed.decoding_flops_per_s == pytest.approx(RATE / 2)


def test_a_plan_takes_the_speeds_of_its_own_run_or_of_another(measured: tuple[Path, Plan]) -> None:
    folder, unmeasured = measured
    config = load_config(write(folder), [f"prompts.path={folder}/prompts.txt", f"run.uri={folder}/run"])
    for speeds in (speeds_for(config, None), speeds_for(config, f"{folder}/run")):
        plan = make_plan(config, plan_prompts(config.prompts), speeds)
        assert list(plan.gpu_hours) == ["H100"]
        hours = plan.gpu_hours["H100"]
        assert list(hours.generation) == pytest.approx([plan.totals.transformer_flops / RATE / 3600] * 2)
        assert list(hours.decoding) == pytest.approx([plan.totals.decode_flops / RATE * 2 / 3600] * 2)
    assert len(unmeasured.gpu_hours) > 5
    with pytest.raises(StorageError, match="no run at this address"):
        speeds_for(config, f"{folder}/elsewhere")
    empty = RolloutRun(f"{folder}/empty")
    empty.ensure(RolloutRun(f"{folder}/run").require())
    with pytest.raises(UsageError, match="no timings to plan with"):
        speeds_for(config, empty.uri)


def test_wall_clock_price_and_memory_are_answered(measured: tuple[Path, Plan]) -> None:
    """Given 10,000 prompts of two whole hours each, 6 GPUs take a sixth of it, and 7 times as many as one."""
    folder, _ = measured
    config = load_config(write(folder), ["prompts.count=10000", "prompts.path=null"])
    speed = Speed("H100", "runs/x", 3, RATE / 1000, None)
    plan = make_plan(config, plan_prompts(config.prompts), [speed])
    out = io.StringIO()
    print_plan(Console(file=out, width=200, markup=False), plan, gpus=6, price=2.5)
    text = out.getvalue()
    hours = plan.gpu_hours["H100"].total.most
    assert f"for {hours * 2.5:,.2f} at 2.5 an hour, without scores." in text and "on 6 GPUs" in text
    assert "Hours are from measured timings: 2 MFLOP/s generating on H100 (3 rollouts of runs/x)." in text
    assert text.count("Memory:") == 1 and "which H100 has" in text
    (row,) = (line.split() for line in text.splitlines() if line.startswith("hours, H100"))
    assert float(row[4].replace(",", "")) == round(hours)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H100 80GB HBM3, torch 2.12.1, cuDNN 9", "H100"),
        ("NVIDIA H100 PCIe, torch 2", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA L40S", "L40S"),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_the_names_that_commits_give_them(text: str, name: str | None) -> None:
    assert device_named(text) == name


def test_options_of_the_command_are_checked(measured: tuple[Path, Plan]) -> None:
    folder, _ = measured
    config = [str(write(folder)), "--set", f"prompts.path={folder}/prompts.txt", "--set", f"run.uri={folder}/run"]
    wrong = CliRunner().invoke(cli.app, ["plan", *config, "--gpu", "H1000"])
    assert wrong.exit_code == 2 and "not a kind that plan knows. Fix: one of B200" in wrong.stderr
    other = CliRunner().invoke(cli.app, ["plan", *config, "--gpu", "A100"])
    assert other.exit_code == 2 and "the timings are of H100" in other.stderr
    shown = json.loads(CliRunner().invoke(cli.app, ["plan", *config, "--json"]).stdout)
    assert shown["speeds"][0]["rollouts"] == 1 and list(shown["gpu_hours"]) == ["H100"]

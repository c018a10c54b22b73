from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from lrag_ray.cli import bench as cli
from lrag_ray.errors import UsageError


def program() -> typer.Typer:
    app = typer.Typer()
    cli.register(app)
    return app


def test_every_part_is_measured_and_methods_are_compared() -> None:
    arguments = [
        "bench",
        "rollout",
        "--compare",
        "infinity_rope",
        "--blocks",
        "1",
        "--depth-s",
        "4.5",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(program(), [*arguments, "--bank", "int4", "--bank-blocks", "7"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    rag, rope = found["methods"]
    assert (rag["method"], rope["method"], found["depth_frames"], found["device"]) == (
        "rag",
        "infinity_rope",
        18,
        "cpu",
    )
    for part in ("denoise", "context", "encode", "search", "gather", "decode", "admit"):
        assert rag["parts_ms"][part] > 0, part
    # The method's own parts are within the passes.
    own = sum(rag["parts_ms"][part] for part in ("encode", "search", "gather", "admit"))
    assert own < rag["parts_ms"]["denoise"] + rag["parts_ms"]["context"]
    assert rag["fps"] == pytest.approx(12 / rag["ms_per_block"] * 1e3)
    assert rag["fps_decoded"] < rag["fps"] and rag["fps_overlapped"] > 0
    assert rag["mfu"] is None
    assert rag["launches"] > rope["launches"] > 100
    assert (rag["history_frames"], rope["history_frames"]) == (18 + 6 - 12, 0)
    assert rag["history_bytes"] == rag["history_frames"] * 2 * 3 * 64 * 64 * 4
    (compared,) = found["compared"]
    assert compared["low"] <= compared["ratio"] <= compared["high"]
    (int4,) = found["differences"]
    assert (int4["history"], int4["frames"]) == ("int4", 21)
    assert 0 < int4["latent_rms"] < int4["latent_max"] < 0.1
    assert 0 <= int4["changed"] <= 1
    assert found["peak_host_bytes"] > 1e7


def test_matrix_products_are_compared_in_speed_and_latents() -> None:
    arguments = ["bench", "rollout", "--method", "infinity_rope", "--blocks", "1", "--depth-s", "0", "--no-decode"]
    done = CliRunner().invoke(program(), [*arguments, "--device", "cpu", "--products", "fp8", "--bank-blocks", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [each["products"] for each in found["methods"]] == ["exact", "fp8"]
    (compared,), (differs,) = found["compared"], found["differences"]
    assert (compared["products"], differs["products"], differs["history"], differs["frames"]) == (
        *("fp8", "fp8", "exact"),
        6,
    )
    assert 1e-3 < differs["latent_rms"] < differs["latent_max"] < 0.5


@pytest.mark.parametrize("wrong", ["--backbone", "--method", "--bank", "--products"])
def test_unknown_names_are_refused_with_the_known_ones(wrong: str) -> None:
    done = CliRunner().invoke(program(), ["bench", "rollout", wrong, "none"])
    assert done.exit_code == 2 or isinstance(done.exception, UsageError)


def test_rolling_windows_are_measured_with_their_own_loop() -> None:
    arguments = ["bench", "rollout", "--method", "rolling_forcing", "--blocks", "1", "--depth-s", "0.75"]
    done = CliRunner().invoke(program(), [*arguments, "--device", "cpu", "--no-decode", "--prompts-per-pass", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    for rolling, rows in zip(found["methods"], (1, 2), strict=True):
        assert rolling["prompts_per_pass"] == rows
        assert rolling["fps_overlapped"] is None
        assert rolling["parts_ms"]["denoise"] > 0 and rolling["parts_ms"]["context"] > 0
        assert rolling["fps"] == pytest.approx(rows * 12e3 / rolling["ms_per_block"])
    (compared,) = found["compared"]
    single, both = (each["ms_per_block"] for each in found["methods"])
    assert (compared["method"], compared["prompts_per_pass"]) == ("rolling_forcing", 2)
    assert compared["ratio"] == pytest.approx(both / 2 / single)


@pytest.mark.parametrize("method", ["dummy_forcing", "forcing_kv", "deep_forcing"])
def test_a_storage_type_is_refused_where_no_history_is_kept(method: str) -> None:
    arguments = ["bench", "rollout", "--method", method, "--device", "cpu", "--bank", "int8"]
    done = CliRunner().invoke(program(), arguments)
    assert done.exit_code == 2
    assert f"--bank int8: {method} keeps no history over 120 latent frames" in done.output

"""What `lrag-ray methods` says of every method."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.context.policy import Family
from lrag_ray.context.registry import policy_class, registered


@pytest.fixture(scope="module")
def methods() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    return found


def test_every_method_says_where_it_comes_from(methods: dict[str, dict[str, Any]]) -> None:
    """Given the registry, each method has a family, a paper and a licence."""
    assert list(methods) == registered()
    for name, method in methods.items():
        assert method["family"] in get_args(Family) and method["family"] != "other", name
        assert method["paper"] and method["code"] and method["licence"] and method["summary"], name


def test_defaults_spend_one_budget_and_released_settings_are_settings(methods: dict[str, dict[str, Any]]) -> None:
    """Rolling windows hold 12 frames by themselves, so that 21 leave as many past frames as the others have."""
    attended = {name: method["attended_frames"] for name, method in methods.items()}
    assert attended.pop("rolling_forcing") - 12 == 12 - 3
    assert set(attended.values()) == {12}
    assert {method["settings"]["sink"] for method in methods.values() if "sink" in method["settings"]} == {1}
    for name, method in methods.items():
        for settings in (method["released"], method["as_released"]):
            policy_class(name).check(policy_class(name).Settings(**settings), 3)


def test_costs_and_restrictions_are_those_of_the_policy(methods: dict[str, dict[str, Any]]) -> None:
    frame = 287_539_200
    assert methods["base"]["device_bytes"] == methods["memrope"]["device_bytes"] == 12 * frame
    assert methods["ema_sink"]["device_bytes"] == 14 * frame
    assert methods["rag"]["history_bytes"] == 468 * frame
    assert "needs weights (encoder)" in methods["rag"]["restrictions"]
    assert "at most 8192 latent frames" in methods["rolling_sink"]["restrictions"]
    assert methods["infinity_rope"]["restrictions"] == []
    assert methods["rolling_forcing"]["device_bytes"] == 24 * frame
    assert "every duration is a rollout of its own" in methods["rolling_forcing"]["restrictions"]


def test_the_table_shows_all_of_it() -> None:
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "220"}).stdout
    assert all(word in shown for word in (*registered(), "CC-BY-NC-SA-4.0", "134.6 GB", "memrope: window: 12, sink: 3"))

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
from rich.console import Console

from lrag_ray.cli.output import count, duration, plain, print_json, quantity, say
from lrag_ray.store.records import RolloutId


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.96, "1 kB"),
        (287_539_200, "287.5 MB"),
        (141.479e12, "141.5 TB"),
        (3.4584e22, "3.458e+04 EB"),
    ],
)
def test_quantities_have_four_digits(value: float, text: str) -> None:
    assert quantity(value, "B") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90_000, "25 h 0 min"),
        (200_000, "2 d 8 h"),
    ],
)
def test_durations_are_told_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_are_grouped() -> None:
    assert count(1_228_800) == "1,228,800"


def test_json_goes_through_dataclasses_and_records(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Outer:
        rollouts: tuple[RolloutId, ...]
        note: str

    value = Outer((RolloutId(backbone="b", method="m", prompt_id="p"),), "ü")
    assert plain(value) == {"rollouts": [{"backbone": "b", "method": "m", "prompt_id": "p", "sample": 0}], "note": "ü"}
    print_json(value)
    assert json.loads(capsys.readouterr().out) == plain(value)


@pytest.mark.parametrize(
    ("terminal", "shown"),
    [
        (
            True,
            "fail  vae  a message that is\n      longer than the line:\n"
            "      /a/very/long/path/that/must/stay/whole.pth\n      Fix: one\n",
        ),
        (
            False,
            "fail  vae  a message that is longer than the line: /a/very/long/path/that/must/stay/whole.pth\n"
            "  Fix: one\n",
        ),
    ],
)
def test_a_line_is_broken_between_words_on_a_terminal_alone(terminal: bool, shown: str) -> None:
    out = io.StringIO()
    to = Console(file=out, width=30, force_terminal=terminal, color_system=None)
    text = "a message that is longer than the line: /a/very/long/path/that/must/stay/whole.pth\n  Fix: one"
    say(to, f"fail  vae  {text}")
    assert out.getvalue() == shown

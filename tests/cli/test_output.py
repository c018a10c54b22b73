from __future__ import annotations

import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from lrag_ray.cli.output import PrintableConsole, count, duration, natural, print_json, quantity, say
from lrag_ray.cli.tables import print_outcome, table
from lrag_ray.pipelines.evaluate import RunOutcome
from lrag_ray.printable import plain
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from tests.store.make import make_identity


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


LONG = "s3://bucket/a/folder/with-a-long-name/and/another-long-one/video.mp4"


def shown(thing: Any, *, terminal: bool, width: int = 40) -> list[str]:
    """Lines of a console of the program, without what Rich writes for colours."""
    out = io.StringIO()
    to = PrintableConsole(
        file=out, width=width if terminal else 1_000_000, force_terminal=terminal, markup=False, color_system=None
    )
    to.print(thing)
    return out.getvalue().splitlines()


def test_text_is_broken_between_words_on_a_terminal_and_not_at_all_elsewhere() -> None:
    line = f"videos of this start: {LONG} and some more words after it"
    assert shown(line, terminal=False) == [line]
    assert shown(line, terminal=True) == ["videos of this start:", LONG, "and some more words after it"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_breaks_no_path_in_its_cells_or_its_title(terminal: bool) -> None:
    made = table(f"{LONG} 1", "video", "clips")
    made.add_row(LONG, "3")
    made.add_row("b.mp4 with a name of so many words that it does not fit in a line", "4")
    lines = shown(made, terminal=terminal)
    assert lines[0] == f"{LONG} 1"
    assert [line for line in lines[1:] if line.startswith(f"{LONG} ") and line.endswith(" 3")]


def test_a_cell_of_any_length_leaves_a_table_readable() -> None:
    made = table("t", "video", "clips")
    made.add_row("x" * 100_000, "3")
    assert max(map(len, shown(made, terminal=True))) <= 500


def test_commands_that_are_printed_can_be_pasted(stored_run_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = RunOutcome(0, stored_run_uri, 0, 0, 0, (), {}, 1.0)
    print_outcome(PrintableConsole(width=100, markup=False), RolloutRun(stored_run_uri), outcome)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "lrag-ray status" in line]
    command = shlex.split(line.partition("lrag-ray ")[2])
    assert command == ["status", stored_run_uri]


@pytest.fixture
def stored_run_uri(tmp_path: Path) -> str:
    run = RolloutRun(str(tmp_path / "run #2; it's"))
    run.ensure(make_identity())
    return run.uri


def test_workers_stand_in_natural_order() -> None:
    assert sorted(["worker-10", "worker-2", "worker-1"], key=natural) == ["worker-1", "worker-2", "worker-10"]


class _Pair(NamedTuple):
    name: str
    sizes: tuple[int, int]


def test_named_tuples_are_printed_with_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"jobs": [_Pair("a", (1, 2))]})
    assert json.loads(capsys.readouterr().out) == {"jobs": [{"name": "a", "sizes": [1, 2]}]}

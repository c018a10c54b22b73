"""Names and texts in a stranger's run: no command lets them act on the terminal."""

from __future__ import annotations

import ast
import io
import json
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from lrag_ray.cli import app as cli
from lrag_ray.cli.output import PrintableConsole, print_json, say
from lrag_ray.cli.submit import _print_submitted
from lrag_ray.pipelines.submit.submit import SubmittedJob
from lrag_ray.printable import json_text, printable
from lrag_ray.store.failures import write_failure
from lrag_ray.store.records import FailureRecord, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import make_identity, store_rollout

ATTACKS = {
    "escape": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;mailto:x\x07click\x1b]8;;\x07",
    "c1": "\x9b2J\x9d0;t\x9c",
    "return": "safe\rover\x08\x7f",
    "bidi": "\u202eevil\u2066\u061c",
    "hidden": "ze\u200bro\u200d\u2060\ufeff\U000e0041",
    "separators": "one\u2028two\u2029",
    "markup": "[red]x[bold]",
}
NAME = "".join(ATTACKS.values())
LONG = "x" * 100_000


def shown_unsafe(text: str) -> set[str]:
    return {c for c in text if c not in "\n\t" and unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    """One committed rollout whose method, prompt, label and failure are hostile, and files called so."""
    run = RolloutRun(str(tmp_path_factory.mktemp("hostile") / "run"))
    identity = make_identity([NAME + LONG], ["base", NAME], [6])
    backbone = identity.backbones["tiny"].model_copy(update={"label": NAME})
    identity = run.ensure(identity.model_copy(update={"backbones": {"tiny": backbone}, "versions": {NAME: NAME}}))
    (prompt_id,) = identity.prompts
    rollout = RolloutId(backbone="tiny", method=NAME, prompt_id=prompt_id)
    store_rollout(run, identity, rollout, [6])
    failed = RolloutId(backbone="tiny", method="base", prompt_id=prompt_id)
    write_failure(
        run.storage,
        FailureRecord(
            task=failed.path,
            attempt="a",
            kind="exception",
            counted=True,
            counted_attempts=3,
            quarantined=True,
            reason=f"{NAME}\nAll done.",
            traceback=NAME,
            created_at=now_utc(),
        ),
    )
    run.storage.write(f"{rollout.path}/attempt-two/video-{NAME}.mp4", b"unnamed")
    run.storage.write(f"{failed.path}/commit-6.json", json.dumps({NAME: NAME}).encode())
    run.storage.write("config.json", json.dumps({NAME: NAME, "scoring": {"suite": NAME}}).encode())
    return run


COMMANDS = {
    "status": (1,),
    "report": (0,),
    "report --csv": (0,),
    "report --latex": (0,),
    "gc --older-than 0": (0,),
    "verify --run": (2,),
    "decode": (0, 1, 2, 3),
    "score --suite none": (2,),
}


@pytest.mark.parametrize("form", ["", "--json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_on_a_run_lets_a_name_act_on_the_terminal(hostile: RolloutRun, command: str, form: str) -> None:
    name, *options = command.split()
    if form and {"--csv", "--latex"} & set(options):
        return
    arguments = [name, *options, hostile.uri, *([form] if form else [])]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code in COMMANDS[command], result.output[:2000]
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert shown_unsafe(result.stdout + result.stderr) == set()
    if form and result.stdout:
        json.loads(result.stdout)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_inspect_shows_the_prompt_without_its_controls(hostile: RolloutRun, form: list[str]) -> None:
    (prompt_id,) = hostile.require().prompts
    result = CliRunner().invoke(cli.app, ["inspect", f"{hostile.uri}/rollouts/tiny/{NAME}/{prompt_id}-0", *form])
    assert result.exit_code == 0, result.output[:2000]
    assert shown_unsafe(result.output) == set()
    assert "[red]x[bold]" in result.output


def test_a_reason_with_line_breaks_cannot_pass_for_a_line_of_ours(hostile: RolloutRun) -> None:
    lines = CliRunner().invoke(cli.app, ["status", hostile.uri]).stdout.splitlines()
    assert "All done." not in lines and any(line.strip().startswith("All done.") for line in lines)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nothing_printed_on_a_console_acts_on_it(attack: str) -> None:
    out = io.StringIO()
    console = PrintableConsole(file=out, force_terminal=True, width=200, markup=False, color_system=None)
    inner = Table(title=Text(attack), caption=attack)
    inner.add_column(attack)
    inner.add_row(Text(attack))
    inner.add_row(attack)
    table = Table.grid()
    table.add_row(inner)
    console.print(attack, Text(attack, style="bold"), table)
    say(console, attack)
    assert shown_unsafe(out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")) == set()


@pytest.mark.parametrize("attack", ["half \ud800 character", *ATTACKS.values()])
def test_json_escapes_and_keeps_the_value(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_json({attack: [attack]})
    shown = capsys.readouterr().out
    assert shown_unsafe(shown) == set()
    assert json.loads(shown) == {attack: [attack]}
    assert json.loads(json_text(attack)) == attack


def test_the_id_of_a_job_that_somebody_else_submitted_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    job = SubmittedJob("a; touch x", "http://head:8265", "runs/x", "RUNNING", None, 0, None, attached=True)
    _print_submitted(job, "evaluate", as_json=False)
    shown = capsys.readouterr().out
    assert "lrag-ray logs 'a; touch x' --follow" in shown and "lrag-ray stop 'a; touch x' --address" in shown


def test_what_is_harmless_stays() -> None:
    text = "a fox — 狐, naïve\tñ ∞\nπ"
    assert printable(text) == text
    assert printable("a\ud800b\x00c") == "a\ufffdb\ufffdc"


def test_only_the_output_module_prints() -> None:
    """A `print`, `echo` or plain `Console` elsewhere in the program would bypass the boundary."""
    for path in (Path(cli.__file__).parent).glob("*.py"):
        if path.name == "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "typer.echo", "typer.secho", "click.echo", "Console", "rich.print"}, path
                assert not called.startswith(("sys.stdout", "sys.stderr.write")), path

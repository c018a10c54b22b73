"""Ctrl-C in any command, at any moment, is exit code 130 and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.abc import MetaPathFinder

import pytest
import typer
from typer.testing import CliRunner

from lrag_ray.__main__ import main
from lrag_ray.cli.output import tells_errors

IMPATIENT = """
import atexit, os, signal
from lrag_ray.cli import app as module

def interrupted():
    raise SystemExit(130)

module.app = interrupted
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
module.main()
"""


def test_a_command_that_is_interrupted_says_so_and_ends_with_130() -> None:
    app = typer.Typer()

    @app.command()
    @tells_errors
    def status() -> None:
        signal.raise_signal(signal.SIGINT)

    ended = CliRunner().invoke(app, [])
    assert (ended.exit_code, ended.stderr) == (130, "interrupted\n")


def test_a_second_ctrl_c_does_not_tear_up_the_end_of_an_interrupted_command() -> None:
    ended = subprocess.run([sys.executable, "-c", IMPATIENT], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_an_interruption_while_the_program_loads_has_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "lrag_ray.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "lrag_ray.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Slow(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")

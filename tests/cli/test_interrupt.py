"""Ctrl-C in any command, at any moment, is exit code 130 and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lrag_ray.cli.output import tells_errors
from lrag_ray.store.lease import new_record, take_lease
from lrag_ray.store.process import ProcessIdentity
from lrag_ray.store.rollouts import RolloutRun
from tests.store.make import make_identity

REPOSITORY = Path(__file__).resolve().parents[2]

IMPATIENT = """
import atexit, os, signal, sys
from lrag_ray.cli import app as module
from lrag_ray.__main__ import main

def interrupted():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))

def command():
    try:
        interrupted()
    finally:
        interrupted()  # while it cleans up
        print("cleaned up", flush=True)

module.app = command
atexit.register(interrupted)
main()
"""

IMPORTING = """
import os, signal, sys

_, number, module, *arguments = sys.argv

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, number))

sys.meta_path.insert(0, Interrupting())
from lrag_ray.__main__ import main
sys.argv = ["lrag-ray", *arguments]
main()
"""

IN_A_LIBRARY = """
import importlib, sys, time
from lrag_ray.interrupts import ends_with_130

sys.path.insert(0, sys.argv[1])
with ends_with_130():
    importlib.import_module("swallows")
    print("imported", flush=True)
    time.sleep(120)
"""
SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
    x = 1
except BaseException:
    raise ImportError("half imported")
"""


IN_A_DESTRUCTOR = """
import os, signal, time
from lrag_ray.interrupts import ends_with_130

class Closed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

with ends_with_130():
    Closed()
    time.sleep(120)
"""


def test_a_command_that_is_interrupted_says_so_and_ends_with_130() -> None:
    app = typer.Typer()

    @app.command()
    @tells_errors
    def status() -> None:
        signal.raise_signal(signal.SIGINT)

    ended = CliRunner().invoke(app, [])
    assert (ended.exit_code, ended.stderr) == (130, "interrupted\n")


def run(program: str, *arguments: str) -> tuple[int, str, str]:
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_more_signals_do_not_tear_up_the_end_of_an_interrupted_command(number: str) -> None:
    assert run(IMPATIENT, number) == (130, "cleaned up\n", "interrupted\n")


@pytest.mark.parametrize(
    ("number", "module"),
    [
        ("SIGTERM", "lrag_ray.cli.app"),
        ("SIGINT", "typer"),
        ("SIGTERM", "pydantic"),
        ("SIGINT", "torch"),
        ("SIGTERM", "ray"),
    ],
)
def test_a_signal_while_the_program_is_still_importing_ends_it_at_once(number: str, module: str) -> None:
    assert run(IMPORTING, number, module, "run", str(REPOSITORY / "configs" / "demo.yaml")) == (
        130,
        "",
        "interrupted\n",
    )


def test_a_signal_within_an_import_of_the_work_is_raised_after_it(tmp_path: Path) -> None:
    """A library that translates what interrupts its import would hide it."""
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    began = time.monotonic()
    assert run(IN_A_LIBRARY, str(tmp_path)) == (130, "imported\n", "interrupted\n")
    assert time.monotonic() - began < 60


def test_a_signal_is_not_lost_where_python_lets_no_exception_out() -> None:
    """In a destructor, or in what a library does around a fork; Python would print a traceback and go on."""
    began = time.monotonic()
    assert run(IN_A_DESTRUCTOR) == (130, "", "interrupted\n")
    assert time.monotonic() - began < 60


def test_a_program_that_runs_as_a_module_ends_by_its_exit_code_and_not_by_the_signal(tmp_path: Path) -> None:
    """Python remembers that a KeyboardInterrupt left an `exec`, as dataclasses use, and ends by SIGINT for it."""
    (tmp_path / "program.py").write_text(
        "import signal\nfrom lrag_ray.interrupts import ends_with_130\n"
        "with ends_with_130():\n    exec('signal.raise_signal(signal.SIGINT)')\n"
    )
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    ended = subprocess.run([sys.executable, "-m", "program"], env={**os.environ, "PYTHONPATH": path})
    assert ended.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_wait_for_a_lease_leaves_the_lease_alone(tmp_path: Path, number: signal.Signals) -> None:
    directory = RolloutRun(str(tmp_path))
    directory.ensure(make_identity())
    process = ProcessIdentity(host="node3", pid=4711, space="another boot", started="1")
    record = new_record("run", 600).model_copy(update={"process": process})
    take_lease(directory.storage, record, lambda _: None)
    before = directory.storage.list_details()
    command = [sys.executable, "-m", "lrag_ray", "gc", str(tmp_path), "--remove"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert waiting.stderr is not None
        assert "Waiting for a sign of life" in waiting.stderr.readline()
        waiting.send_signal(number)
        assert (waiting.wait(60), waiting.stderr.read()) == (130, "interrupted\n")
    assert directory.storage.list_details() == before

"""Programs in a mount namespace of their own: file systems that are full or read-only, without touching the machine."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parents[2]


@functools.cache
def unshare_command() -> tuple[str, ...] | None:
    """How to start a program that may mount without anybody noticing; None where this user may not."""
    for command in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        try:
            mounted = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
        except FileNotFoundError:
            return None
        if mounted.returncode == 0:
            return command
    return None


def run_on_small_disk(program: str, folder: Path, size: str) -> str:
    """Standard output of a Python program that finds `folder` (its first argument) on an empty disk of `size`."""
    unshare = unshare_command()
    if unshare is None:
        pytest.skip("this user may not mount a small file system in a namespace of its own (unshare --mount)")
    folder.mkdir(exist_ok=True)
    shell = (
        f"mount -t tmpfs -o size={size} none {shlex.quote(str(folder))} && "
        f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)} {shlex.quote(str(folder))}"
    )
    done = subprocess.run(
        [*unshare, "sh", "-c", shell],
        capture_output=True,
        text=True,
        cwd=_REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

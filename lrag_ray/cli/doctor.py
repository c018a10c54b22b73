"""``lrag-ray doctor``: what is missing on this machine, and how to fix it."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Annotated

import typer

from lrag_ray.cli.options import AsJson, Overrides
from lrag_ray.cli.output import console, print_json, say, tells_errors
from lrag_ray.errors import RunEnvironmentError

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
"""Of the word before a finding."""
_TOTALS = {"ok": "ok", "warn": "to look at", "fail": "failed"}
_FOUND_AT = 25
"""Column at which findings begin."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(doctor)


@tells_errors
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="Check what this job needs as well.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: packages, Ray, GPUs, video codec; with CONFIG also its weights or data, storage and memory.

    Exit code 3 if anything fails.

    \b
    Examples:
      lrag-ray doctor
      lrag-ray doctor configs/table2.yaml
      lrag-ray doctor configs/encoder.yaml
    """
    from lrag_ray.config.load import load_job
    from lrag_ray.pipelines.doctor import examine, healthy

    loaded = load_job(config, overrides or []) if config is not None else None
    rows = []
    out = console()
    for row in examine(loaded, shlex.quote(config) if config is not None else "CONFIG"):
        rows.append(row)
        if not as_json:
            say(out, f"{row.state:<5} {row.check:<18} {row.found}", _FOUND_AT, style=_STYLES[row.state])
            if row.fix:
                say(out, f"{'':<{_FOUND_AT}}fix: {row.fix}", _FOUND_AT, style="bold")
    if as_json:
        print_json({"healthy": healthy(rows), "rows": rows})
    else:
        counts: Counter[str] = Counter(row.state for row in rows)
        said = ", ".join(f"{counts[state]} {word}" for state, word in _TOTALS.items() if counts[state])
        say(out, f"{len(rows)} checks: {said}.", 0)
    if not healthy(rows):
        raise typer.Exit(RunEnvironmentError.exit_code)

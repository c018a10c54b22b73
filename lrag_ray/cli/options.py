"""Arguments and options that commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Address of the run directory (run.uri).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Replace a value of the file (YAML); may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; errors as JSON on stderr.")]
Progress = Annotated[
    Literal["auto", "log", "json"],
    typer.Option("--progress", help="On stderr: live on a terminal and lines elsewhere, lines, or JSON events."),
]

"""Arguments and options that commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import typer

from lrag_ray.errors import UsageError

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

_LABELLED = re.compile(r"([\w.+-]{1,40})=(.+)", re.DOTALL)


class NamedRuns(NamedTuple):
    """Runs as a command was given them."""

    uris: list[str]
    labels: list[str | None]
    """What stands before ``=`` in ``A=runs/a``; None where nothing does."""


def named_runs(texts: Sequence[str]) -> NamedRuns:
    """Addresses and labels of ``RUN`` and ``LABEL=RUN``. UsageError for a label that is given twice."""
    matches = [_LABELLED.fullmatch(text) for text in texts]
    labels = [match and match[1] for match in matches]
    for label in labels:
        if label is not None and labels.count(label) > 1:
            raise UsageError(f"the label {label} was given twice: every run needs its own")
    return NamedRuns([match[2] if match else text for match, text in zip(matches, texts, strict=True)], labels)

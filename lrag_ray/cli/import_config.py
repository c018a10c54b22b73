"""``lrag-ray import-config``: our configuration from an inference YAML of the released code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrag_ray.cli.output import tells_errors, write
from lrag_ray.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("import-config")(import_config)


@tells_errors
def import_config(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Inference YAML of the released code.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="CONFIG", help="File to write, which must not exist yet [default: stdout]."),
    ] = None,
) -> None:
    """Write a configuration from an inference YAML of Self-Forcing, Causal-Forcing, LongLive or LongLive-RAG.

    What has no equivalent is listed in comments at its top, and printed with --to. Relative paths stay as they are:
    they are those of the folder in which the released code runs.

    \b
    Examples:
      lrag-ray import-config configs/longlive_inference.yaml --to longlive.yaml
      lrag-ray import-config configs/self_forcing_dmd.yaml > self_forcing.yaml
    """
    from lrag_ray.config.foreign import import_config as imported
    from lrag_ray.config.load import complete
    from lrag_ray.config.source import parse_document, read_document

    text = imported(file, read_document(file).data)
    # What is written can be run.
    complete(parse_document(f"{file} as imported", text))
    if to is None:
        write(text, end="")
        return
    try:
        with Path(to).open("x", encoding="utf-8") as target:
            target.write(text)
    except OSError as error:
        raise UsageError(f"{to} cannot be written: {error.strerror}. Fix: give another --to") from error
    for line in text.splitlines():
        if line.startswith("# "):
            write(line[2:])

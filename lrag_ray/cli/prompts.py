"""``lrag-ray prompts``: prompts of a dataset on the Hugging Face Hub, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrag_ray.cli.options import AsJson
from lrag_ray.cli.output import console, print_json, tells_errors
from lrag_ray.printable import counted


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(prompts)


@tells_errors
def prompts(
    dataset: Annotated[
        str, typer.Argument(metavar="hub://OWNER/NAME[/FILE][@REVISION]", help="Dataset repository, and file in it.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="File to write.")],
    column: Annotated[str, typer.Option("--column", help="Column that holds the prompt.")] = "prompt",
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the prompts of a dataset on the Hugging Face Hub to a file for prompts.path, with their other columns.

    Reads .parquet, .csv, .tsv, .json and .jsonl. HF_TOKEN is the token for private datasets, HF_ENDPOINT a mirror.

    \b
    Examples:
      lrag-ray prompts hub://me/captions captions.jsonl --column caption --limit 128
      lrag-ray prompts hub://me/captions/data/test.parquet@v1 captions.jsonl
    """
    from lrag_ray.pipelines.hub_prompts import fetch_prompts
    from lrag_ray.store.hub import hub_place

    made = fetch_prompts(hub_place(dataset), file, column, limit)
    if as_json:
        print_json(made)
        return
    named = "" if column == "prompt" else f" --set prompts.column={column}"
    console().print(f"{made.file}: {counted(made.prompts, 'prompt')} of {made.source}", soft_wrap=True, markup=False)
    console().print(f"Use them: --set prompts.path={made.file}{named}", soft_wrap=True, markup=False)

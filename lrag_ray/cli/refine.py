"""``lrag-ray refine``: the prompts of a configuration, refined, as a list to review."""

from __future__ import annotations

from typing import Annotated

import typer

from lrag_ray.cli.options import AsJson, Config, Overrides, Progress
from lrag_ray.cli.output import console, print_json, tells_errors
from lrag_ray.printable import counted


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(refine)


@tells_errors
def refine(
    config: Config,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FILE", help="Write the list: .txt, or .csv and .jsonl with the originals."),
    ] = None,
    overrides: Overrides = None,
    progress: Progress = "auto",
    as_json: AsJson = False,
) -> None:
    """Refine the prompts of a configuration with the model that prompts.refine names, and generate nothing.

    Answers are stored in the run: `run` takes them from there, and the same command again asks nothing twice. A list
    that is written with --to can be read, edited and then used as prompts.path, without prompts.refine.

    \b
    Examples:
      lrag-ray refine mine.yaml --to refined.csv
      lrag-ray refine mine.yaml --set prompts.refine.max_calls=100
    """
    from lrag_ray.cli.progress import shown_progress
    from lrag_ray.config.load import load_config
    from lrag_ray.pipelines.refine import refine_prompts, write_list

    loaded = load_config(config, overrides or [])
    with shown_progress(progress) as listener:
        outcome = refine_prompts(loaded, listener=listener)
    if to is not None and outcome.prompts:
        write_list(outcome.prompts, to)
    if as_json:
        print_json(outcome)
    else:
        shown = console()
        for prompt in outcome.prompts if to is None else ():
            shown.print(f"{prompt.line}: {prompt.text}", markup=False, highlight=False)
        for title, reason in outcome.missing.items():
            shown.print(f"{title}: {reason}", markup=False, highlight=False)
        where = f", written to {to}" if to is not None and outcome.prompts else ""
        kept = f", {outcome.kept_original} of them as they were" if outcome.kept_original else ""
        section = loaded.prompts.refine
        spent = f" ({outcome.spent.described(section)})" if section else ""
        shown.print(f"{counted(len(outcome.prompts), 'prompt')}{kept}{where}{spent}", markup=False, highlight=False)
    raise typer.Exit(outcome.exit_code)

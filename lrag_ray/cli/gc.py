"""``lrag-ray gc``: what a run's storage holds that nothing needs any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lrag_ray.cli.options import AsJson, Run
from lrag_ray.cli.output import console, count, notices, print_json, quantity, tells_errors
from lrag_ray.cli.tables import table
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from rich.console import Console

    from lrag_ray.pipelines.gc import GcOutcome

_PATHS_SHOWN = 20


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(gc)


@tells_errors
def gc(
    run_uri: Run,
    remove: Annotated[bool, typer.Option("--remove", help="Delete what is found; without it nothing changes.")] = False,
    older_than_h: Annotated[
        float, typer.Option("--older-than", metavar="HOURS", min=0, help="Leave alone what was written later.")
    ] = 1.0,
    unfinished: Annotated[
        bool,
        typer.Option("--unfinished", help="Also parts of rollouts that are not finished: they would begin again."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what failed attempts, interrupted writes and probes left in a run, or delete it.

    Never touches what a commit names, nor, without --unfinished, the parts from which unfinished rollouts continue.
    Deletes only while nobody makes rollouts or decodes them; scoring and reports may go on meanwhile: what they wrote
    within the last hour stays.

    \b
    Examples:
      lrag-ray gc runs/table2
      lrag-ray gc runs/table2 --remove --older-than 24
    """
    from lrag_ray.pipelines.gc import collect_garbage
    from lrag_ray.store.rollouts import RolloutRun

    outcome = collect_garbage(
        RolloutRun(run_uri),
        remove=remove,
        older_than_s=older_than_h * 3600,
        unfinished=unfinished,
        listener=notices,
    )
    if as_json:
        print_json(outcome)
    else:
        _print(console(), outcome)


def _print(out: Console, outcome: GcOutcome) -> None:
    if outcome.leftovers:
        shown = table(f"Leftovers of {outcome.uri}", "kind", "files", "size")
        for kind, (files, size) in outcome.by_kind().items():
            shown.add_row(kind, count(files), quantity(size, "B"))
        out.print(shown)
        for leftover in outcome.leftovers[:_PATHS_SHOWN]:
            out.print(f"  {leftover.path}")
        if len(outcome.leftovers) > _PATHS_SHOWN:
            out.print(f"  … and {count(len(outcome.leftovers) - _PATHS_SHOWN)} more (--json lists all)")
    total = f"{counted(len(outcome.leftovers), 'file')}, {quantity(outcome.size_bytes, 'B')}"
    if not outcome.leftovers:
        out.print("nothing to remove")
    elif outcome.removed:
        out.print(f"removed: {total}")
    else:
        out.print(f"found: {total}. Nothing was changed; --remove deletes them")
    if outcome.too_young:
        out.print(f"kept: {count(outcome.too_young)} that were written lately (--older-than)")

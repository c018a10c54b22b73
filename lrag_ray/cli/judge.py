"""``lrag-ray judge``: human raters beside the judge suite."""

from __future__ import annotations

from typing import Annotated

import typer

from lrag_ray.cli.options import AsJson, Run
from lrag_ray.cli.output import console, print_json, tells_errors
from lrag_ray.printable import counted


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    group = typer.Typer(no_args_is_help=True, help="Human raters: a page of blinded cases, and their answers.")
    group.command("export")(export)
    group.command("import")(import_)
    app.add_typer(group, name="judge")


@tells_errors
def export(
    run_uri: Run,
    to: Annotated[str, typer.Option("--to", metavar="FILE", help="The page: one HTML file, videos included.")],
    questions: Annotated[
        str, typer.Option("--questions", metavar="A,B", help="Question sets by name, or YAML files.")
    ] = "exposure",
    cases: Annotated[int, typer.Option("--cases", min=1, help="Prompts and samples per cell.")] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw; the judge's default is 0.")] = 0,
    duration_s: Annotated[
        float | None, typer.Option("--duration", metavar="SECONDS", help="Only videos of this duration.")
    ] = None,
    max_side: Annotated[int, typer.Option("--max-side", min=16, help="Longest side of the videos in pixels.")] = 480,
    as_json: AsJson = False,
) -> None:
    """Write a page with which people rate the same cases as the judge, without knowing what made them.

    The page needs nothing but a browser. It saves a JSON file, which `judge import` reads. The key to its numbers stays
    in the run. With the same questions, cases and seed as the judge's, the report says how far people and judge agree.

    \b
    Examples:
      lrag-ray judge export runs/table2 --to rating.html --duration 30
      lrag-ray judge export runs/demo --to rating.html --questions preference,exposure --cases 4
    """
    from lrag_ray.pipelines.human_raters import export_page
    from lrag_ray.scoring.judge.settings import JudgeSettings

    settings = JudgeSettings(
        questions=tuple(questions.split(",")), cases=cases, seed=seed, duration_s=duration_s, max_side=max_side
    )
    made = export_page(run_uri, to, settings)
    if as_json:
        print_json(made)
    else:
        text = (
            f"{made.page}: {counted(made.cases, 'case')}, {counted(made.videos, 'video')}, "
            f"{made.size_bytes / 1e6:.1f} MB"
        )
        console().print(text, markup=False, highlight=False)


@tells_errors
def import_(
    run_uri: Run,
    file: Annotated[str, typer.Argument(metavar="FILE", help="What the page saved.")],
    as_json: AsJson = False,
) -> None:
    """Store the answers of one rater in the run; `report` then shows the agreement.

    \b
    Examples:
      lrag-ray judge import runs/table2 answers-0123456789abcdef.json
    """
    from lrag_ray.pipelines.human_raters import import_answers

    found = import_answers(run_uri, file)
    if as_json:
        print_json(found)
    else:
        text = (
            f"{found.answers} of {counted(found.cases, 'case')} answered by {found.rater}. Next: lrag-ray "
            f"report {run_uri}"
        )
        console().print(text, markup=False, highlight=False)

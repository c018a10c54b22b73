"""``lrag-ray report``: rank tables, differences, drift and the page of one run, or of several as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrag_ray.cli.options import AsJson, named_runs
from lrag_ray.cli.output import console, notices, print_json, tells_errors, write
from lrag_ray.errors import UsageError
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from lrag_ray.report import Report


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("report")(report)


@tells_errors
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="[LABEL=]RUN", help="Addresses of run directories (run.uri), with labels.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="FOLDER", help="Where the page and its files go [default: the summary of a single run]."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="Which scores, or package.module:Suite [default: those that compare best].",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="Which scores of vbench_long, compat or direct: modes never share a table."),
    ] = None,
    strips: Annotated[
        int | None,
        typer.Option(
            "--strips", metavar="N", min=0, help="Prompts per backbone that get strips [default: 3; of suite world, 8]."
        ),
    ] = None,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print the rank tables as CSV (values unrounded) and write nothing.")
    ] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print them as a LaTeX table and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rank methods per backbone and duration, with paired differences, drift over time, strips and side-by-side videos.

    Reads storage alone. Several runs are shown as one: they may hold different methods, backbones, durations and
    prompts. With labels, methods that several runs have are shown as ``rag (A)`` and ``rag (B)``; without, equal names
    must mean the same. Methods are compared over the prompts that all of them have. Of an
    encoder training it writes the page of its losses.

    \b
    Examples:
      lrag-ray report runs/demo
      lrag-ray report runs/table2 --suite vbench_long --mode compat --latex > table2.tex
      lrag-ray report runs/base runs/rag --to reports/both
      lrag-ray report A=runs/a B=runs/b --to reports/both
    """
    from lrag_ray.pipelines.report import report as make_report
    from lrag_ray.report import collect
    from lrag_ray.report.data_files import ranks_csv
    from lrag_ray.report.latex import latex_table
    from lrag_ray.store.address import Storage
    from lrag_ray.store.rollouts import RolloutRun
    from lrag_ray.store.training_run import holds_training

    if as_csv + as_latex + as_json > 1:
        raise typer.BadParameter("give at most one of --csv, --latex and --json")
    runs, labels = named_runs(runs)
    if any(holds_training(Storage(uri)) for uri in runs):
        _training_report(runs, as_json, to or suite or mode or as_csv or as_latex)
        return
    run_dirs = [RolloutRun(uri) for uri in runs]
    if as_csv or as_latex:
        data = collect(run_dirs, suite, mode, must_have=True, labels=labels)
        write(ranks_csv(data) if as_csv else latex_table(data), end="")
        return
    made = make_report(run_dirs, to=to, suite=suite, mode=mode, strips=strips, listener=notices, labels=labels)
    if as_json:
        print_json(_plain(made))
    else:
        _print(made)


def _training_report(runs: list[str], as_json: bool, other: Any) -> None:
    from lrag_ray.report.training import write_training_report
    from lrag_ray.store.training_run import TrainingRun

    if len(runs) > 1 or other:
        raise UsageError("an encoder training has a page of its own. Fix: give its address alone, without options")
    made = write_training_report(TrainingRun(runs[0]))
    if as_json:
        print_json({"folder": made.folder, "files": made.files, "epochs": made.epochs})
        return
    console().print(f"page: {made.folder}/{made.files[0]}", soft_wrap=True)
    console().print(f"data: {', '.join(made.files[1:])} beside it", soft_wrap=True)


def _print(made: Report) -> None:

    out = console()
    for warning in made.warnings:
        out.print(f"Note: {warning}")
    for table in made.terminal_tables():
        out.print(table)
        out.print()
    if made.data.durations_note and len(made.blocks) > 1:
        out.print(f"{made.data.durations_note}.")
    if made.data.unscored:
        out.print("Not scored, as configured (`lrag-ray score RUN` scores its videos).")
    elif not made.blocks:
        out.print(f"No scores yet ({made.data.suite.title}).")
    if made.data.scores.pending and not made.data.unscored:
        left = counted(made.data.scores.pending, "video")
        out.print(f"Not scored in full yet: {left} at their durations (`lrag-ray score RUN`).")
    if made.data.scores.failures:
        failed = counted(len(made.data.scores.failures), "video")
        out.print(f"Without a score, or not in every measure: {failed}; the page says why.")
    if made.data.other_suites:
        out.print(f"Not shown: scores of {'; '.join(made.data.other_suites)} (--suite, --mode).")
    if made.folder is None:
        out.print("No page was written: give --to FOLDER for the page of several runs.")
    else:
        out.print(f"page: {made.folder}/{made.files[0]}", soft_wrap=True)
        out.print(f"data: {', '.join(made.files[1:])} beside it", soft_wrap=True)


def _plain(made: Report) -> dict[str, Any]:
    data = made.data
    return {
        "runs": data.uris,
        "suite": data.suite.name,
        "mode": data.suite.mode or None,
        "warnings": made.warnings,
        "not_shown": data.other_suites,
        "folder": made.folder,
        "files": made.files,
        "blocks": [
            {
                "backbone": block.backbone,
                "duration_s": data.duration_s(block.backbone, block.latent_frames),
                "latent_frames": block.latent_frames,
                "prompts": block.prompts,
                "videos_per_method": block.videos,
                "prompts_left_out": block.prompts_left_out,
                "methods": block.rows,
                "frozen": data.frozen_means(block),
                "differences": [
                    {
                        "method": contrast.method,
                        "reference": contrast.reference,
                        "measures": {name: found._asdict() for name, found in contrast.intervals.items()},
                    }
                    for contrast in statistics.contrasts
                ],
                "noise": [
                    {"method": method, "measure": measure, "sample_deviation": value}
                    for (method, measure), value in statistics.noise.items()
                ],
            }
            for block, statistics in zip(data.blocks, data.statistics, strict=True)
        ],
    }

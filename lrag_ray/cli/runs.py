"""``lrag-ray runs | videos | diff``: looking around in what is there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from lrag_ray.cli.options import AsJson, Run
from lrag_ray.cli.output import console, print_json, tells_errors, write
from lrag_ray.errors import LragError, UsageError

_MOST_NAMES = 5
_MOST_LETTERS = 60


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("runs")(runs)
    app.command("videos")(videos)
    app.command("diff")(diff)


@tells_errors
def runs(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or bucket prefix with runs.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder: how far each is, and who works on it.

    \b
    Examples:
      lrag-ray runs
      lrag-ray runs s3://bucket/experiments
    """
    from lrag_ray.cli.tables import table
    from lrag_ray.store.overview import runs_below
    from lrag_ray.store.rollouts import RolloutRun
    from lrag_ray.store.status import run_status

    found: list[dict[str, Any]] = []
    for uri in runs_below(folder):
        run_dir = RolloutRun(uri)
        try:
            identity, status = run_dir.require(), run_status(run_dir, scores=False)
        except LragError as error:
            found.append({"uri": uri, "problem": str(error)})
            continue
        found.append(
            {
                "uri": uri,
                "backbones": [*identity.backbones],
                "methods": [*identity.methods],
                "prompts": len(identity.prompts),
                "durations_s": sorted({cell.duration_s for cell in status.cells}),
                "done": sum(cell.done for cell in status.cells),
                "total": sum(cell.total for cell in status.cells),
                "quarantined": len(status.failures),
                "created_at": identity.created_at,
                "held_by": status.held_by,
            }
        )
    if as_json:
        print_json(found)
        return
    out = console()
    if not found:
        out.print(f"no runs in {folder}")
        return
    shown = table("Runs", "run", "backbones", "methods", "durations", "prompts", "done", "state", text_columns=4)
    for run in found:
        if "problem" in run:
            shown.add_row(run["uri"], "", "", "", "", "", "not readable")
            continue
        durations = " ".join(f"{duration:g} s" for duration in run["durations_s"])
        shown.add_row(
            run["uri"],
            " ".join(run["backbones"]),
            " ".join(run["methods"]),
            durations,
            str(run["prompts"]),
            f"{run['done']}/{run['total']}",
            _state(run),
        )
    out.print(shown)
    for run in found:
        if "problem" in run:
            out.print(f"\nNote: {run['problem']}")


def _state(run: Mapping[str, Any]) -> str:
    if run["held_by"] is not None:
        return "at work"
    if run["done"] == run["total"]:
        return "done"
    return f"{run['quarantined']} quarantined" if run["quarantined"] else "open"


@tells_errors
def videos(
    run_uri: Run,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Part of the prompt, in any case, or a prompt_id.")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="Only this method.")] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="Only this backbone.")] = None,
    duration: Annotated[float | None, typer.Option("--duration", metavar="S", help="Only this duration.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the address of every video of a run, one a line.

    \b
    Examples:
      lrag-ray videos runs/table2 --prompt fox --method rag
      mpv $(lrag-ray videos runs/demo --duration 9)
    """
    from lrag_ray.api import open_run

    run = open_run(run_uri)
    identity = run.identity
    durations = {horizon.duration_s for each in identity.backbones.values() for horizon in each.horizons}
    _refuse_unknown("method", method, identity.methods)
    _refuse_unknown("backbone", backbone, identity.backbones)
    if duration is not None and duration not in durations:
        known = ", ".join(f"{each:g}" for each in sorted(durations))
        raise UsageError(f"--duration {duration:g}: the run has {known} s")
    found = run.videos(prompt=prompt, method=method, backbone=backbone, duration_s=duration)
    if as_json:
        print_json(found)
        return
    for video in found:
        write(video.address)
    if not found:
        write("no video fits. `lrag-ray status RUN` shows what is there", stderr=True)
        raise typer.Exit(1)


def _refuse_unknown(kind: str, name: str | None, known: Iterable[str]) -> None:
    known = [*known]
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(known)}"
        raise UsageError(f"--{kind} {name}: the run has no such {kind}; {hint}")


@tells_errors
def diff(
    first: Annotated[str, typer.Argument(metavar="RUN", help="Address of a run.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="Address of another run.")],
    as_json: AsJson = False,
) -> None:
    """Show how two runs differ: settings, weights, what only one of them has, and whether their latents are equal.

    \b
    Example:
      lrag-ray diff runs/monday runs/tuesday
    """
    from lrag_ray.cli.tables import table
    from lrag_ray.report.run_diff import diff_runs
    from lrag_ray.store.rollouts import RolloutRun

    found = diff_runs(RolloutRun(first), RolloutRun(second))
    if as_json:
        print_json({"equal": found.equal, **dataclasses.asdict(found)})
        return
    out = console()
    for title, changes in (("Settings", found.configuration), ("Weights", found.weights)):
        if changes:
            shown = table(title, "key", "first", "second", text_columns=3)
            for change in changes:
                shown.add_row(change.path, *(_shortened(value) for value in (change.first, change.second)))
            out.print(shown)
            out.print()
    for uri, only in ((first, found.only_first), (second, found.only_second)):
        for kind, names in only.items():
            if names:
                more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
                out.print(f"Only in {uri}: {kind} {', '.join(map(_shortened, names[:_MOST_NAMES]))}{more}")
    if found.cells:
        shown = table("Latents of what both have", "backbone", "method", "latent frames", "equal", "different")
        for cell in found.cells:
            row = (cell.latent_frames, cell.equal, cell.different)
            shown.add_row(cell.backbone, cell.method, *map(str, row))
        out.print(shown)
    else:
        out.print("They have committed no rollout in common.")
    out.print("The runs are equal." if found.equal else "The runs differ.")


def _shortened(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"

"""States as tables."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lrag_ray.cli.output import count, duration, first_of, quantity, say
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from lrag_ray.conformance.case import CaseResult
    from lrag_ray.events import CellScored
    from lrag_ray.pipelines.decode import DecodeOutcome
    from lrag_ray.pipelines.evaluate import RunOutcome
    from lrag_ray.store.integrity import Coverage, Damage
    from lrag_ray.store.rollouts import RolloutRun
    from lrag_ray.store.status import RunStatus


def table(title: str, *columns: str, text_columns: int = 1) -> Table:
    """A plain table whose first columns hold text and whose others hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None, pad_edge=False)
    for position, column in enumerate(columns):
        # Text folds where the terminal is narrow; a number is whole or worth nothing.
        text = position < text_columns
        made.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    return made


def print_status(console: Console, status: RunStatus) -> None:
    """Counts per cell, rate and ETA, failures and records that do not count."""
    cells = table(
        status.uri, "backbone", "method", "duration", "done", "partial", "failed", "pending", "total", text_columns=2
    )
    for cell in status.cells:
        numbers = (cell.done, cell.partial, cell.failed, cell.pending, cell.total)
        cells.add_row(cell.backbone, cell.method, f"{cell.duration_s:g} s", *map(count, numbers))
    console.print(cells)
    console.print()
    for line in (_state(status), _who(status)):
        say(console, line)
    _print_list(
        console,
        "Quarantined; the next start retries them",
        (f"{failure.task}: {failure.reason} ({failure.path})" for failure in status.failures),
    )
    _print_list(console, "Records that do not count; the next start makes again what is missing", status.problems)


def print_outcome(console: Console, run: RolloutRun, outcome: RunOutcome) -> None:
    """Rank tables, what this start did, what failed, and where everything is."""
    from lrag_ray.errors import INTERRUPTED
    from lrag_ray.report.collect import collect
    from lrag_ray.report.tables import rank_tables
    from lrag_ray.store.run_dir import SUMMARY

    for ranks in rank_tables(collect([run])):
        console.print(ranks)
        console.print()
    print_made(console, outcome, f" and scored {counted(outcome.videos_scored, 'video')}")
    places = {"state": f"lrag-ray status {shlex.quote(outcome.uri)}"}
    if outcome.exit_code != INTERRUPTED:
        # An interrupted run has not written its summary.
        places = {
            "page": f"{outcome.uri}/{SUMMARY}/report.html",
            "tables": f"{outcome.uri}/{SUMMARY}/ranks.csv, differences.csv, videos.csv, table.tex, scores.parquet",
            "videos and latents": f"{outcome.uri}/rollouts/<backbone>/<method>/<prompt>-<sample>/",
            **places,
        }
    for what, place in places.items():
        console.print(f"{what + ':':20}{place}", soft_wrap=True)


def print_average_ranks(console: Console, cells: Iterable[CellScored]) -> None:
    """Average ranks as a job reported them, a method a row; nothing where no methods were compared."""
    ranks = {
        (cell.method, cell.backbone, cell.duration_s): cell.average_rank
        for cell in cells
        if cell.average_rank is not None
    }
    columns = list(dict.fromkeys((backbone, duration_s) for _, backbone, duration_s in ranks))
    if not columns:
        return
    from lrag_ray.report.tables import rank_number

    names = (f"{backbone} {duration_s:g} s" for backbone, duration_s in columns)
    shown = table("Average ranks (lower is better)", "method", *names)
    for method in dict.fromkeys(method for method, _, _ in ranks):
        shown.add_row(method, *(rank_number(ranks.get((method, *column))) for column in columns))
    console.print(shown)
    console.print()


def print_made(console: Console, outcome: RunOutcome, more: str = "") -> None:
    """What a start made and what it could not make."""
    console.print(
        f"This start made {count(outcome.commits_made)} of {count(outcome.commits_total)} results{more} in "
        f"{duration(outcome.seconds)}."
    )
    _print_list(
        console,
        "Could not be made; the next start retries them",
        (f"{title}: {reason}" for title, reason in outcome.missing.items()),
    )


def print_decoded(console: Console, outcome: DecodeOutcome) -> None:
    """What a decode made, what it could not make, and where it is."""
    there = f" ({count(outcome.videos_there)} were there)" if outcome.videos_there else ""
    console.print(f"Decoded {counted(outcome.videos_made, 'video')}{there} in {duration(outcome.seconds)}.")
    _print_list(
        console,
        "Rollouts without all their videos",
        (f"{f.rollout}, {', '.join(map(count, f.latent_frames))} latent frames: {f.reason}" for f in outcome.failed),
    )
    for folder in outcome.folders:
        console.print(f"videos: {outcome.uri}/{folder}/<backbone>/<method>/<prompt>-<sample>/", soft_wrap=True)


def _state(status: RunStatus) -> str:
    """How far, and how fast while someone works."""
    scores, parts = status.scores, []
    open_cells = sum(cell.total - cell.done - cell.failed for cell in status.cells)
    if status.done:
        parts.append("All done" if not status.quarantined else "All videos and scores are there")
    elif status.commits_per_hour:
        parts.append(f"{status.commits_per_hour:.3g} commits per hour, about {duration(status.eta_s or 0)} left")
    elif not open_cells:
        parts.append("No rollout is pending")
    else:
        parts.append(f"results not there yet: {count(open_cells)}")
    if scores is not None and scores.pending is None:
        what = "the judge" if scores.suite == "judge" else f"the plug-in {scores.suite}"
        parts.append(f"scores of {what} are not counted")
    elif scores is not None and scores.pending:
        parts.append(f"scores of {scores.suite} not there yet: {count(scores.pending)}")
    if failed := len(status.failures):
        parts.append(f"{count(failed)} quarantined")
    return f"{'; '.join(parts)}."


def _who(status: RunStatus) -> str:
    """Who works on the run, or that nobody does."""
    if status.held_by is not None:
        return f"At work: {status.held_by}."
    again = "" if status.done and not status.quarantined else " The same `lrag-ray run` continues."
    if status.lost is not None:
        return f"Nobody is at work. The last driver did not end properly: {status.lost}.{again}"
    return f"Nobody is at work.{again}"


def _print_list(console: Console, title: str, lines: Iterable[str]) -> None:
    shown = list(lines)
    if shown:
        console.print(f"{title} ({len(shown)}):")
        for line in first_of(shown):
            # What follows a line break cannot pass for a line of ours.
            say(console, "  " + line.replace("\n", "\n      "))


def print_damage(console: Console, damage: Iterable[Damage], coverage: Coverage) -> list[dict[str, str]]:
    """Print damaged files as they are found, then what was read; returns the rows."""
    found: list[dict[str, str]] = []

    def lines() -> Iterator[str]:
        for each in damage:
            found.append(each._asdict())
            yield f"damaged  {each.kind}  {each.path}: {each.what}. Fix: {each.repair}"

    for line in first_of(lines()):
        say(console, line)
    left_out = (
        f"; {counted(coverage.left_out, 'rollout or other file', 'rollouts or other files')} not drawn"
        if coverage.left_out
        else ""
    )
    unnamed = f"; {counted(len(coverage.unnamed), 'file')} that nothing names, not read" if coverage.unnamed else ""
    say(
        console,
        f"{counted(coverage.files, 'file')} read, {quantity(coverage.size_bytes, 'B')}: {count(len(found))} damaged"
        f"{left_out}{unnamed}",
    )
    return found


def print_results(console: Console, results: Iterable[CaseResult]) -> list[CaseResult]:
    """Print conformance rows as they come, then the count; returns them."""
    found = []
    for result in results:
        found.append(result)
        difference = "" if result.max_abs_diff is None else f"{result.max_abs_diff:.2e}"
        tolerance = "" if result.tolerance is None else f"{result.tolerance:.0e}"
        line = (
            f"{result.status}  {result.folder}/{result.case}  {result.tensor}  {difference} / {tolerance}"
            if difference
            else f"{result.status}  {result.folder}/{result.case}  {result.tensor}"
        )
        say(console, f"{line}  {result.reason}".rstrip())
    counts = Counter(result.status for result in found)
    console.print(", ".join(f"{counts[status]} {status}" for status in ("pass", "skip", "fail")))
    return found

"""The live display of a start: readable from one worker to hundreds, on any width and height of terminal.

From top to bottom: headline, bar, progress per backbone and method, workers. Where the workers do not fit below one
another, they are counted per node, with their methods; where that does not fit either, per method.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lrag_ray.cli.output import count, duration, natural
from lrag_ray.cli.run_view import RunView
from lrag_ray.cli.training import losses_table
from lrag_ray.printable import counted
from lrag_ray.store.records import ROLLOUTS
from lrag_ray.watch.tally import Flight, cell_of

_NODE_DIGITS = 6
"""Of Ray's node ids, which are random."""
_GAP = 2
"""Columns between columns."""
_LEAST = 14
"""Columns below which a name says nothing."""


class LiveView:
    """Draws a `RunView` as it is at the moment, into the room that there is."""

    def __init__(self, view: RunView, clock: Callable[[], float] = time.time) -> None:
        """`clock` tells seconds since 1970."""
        self._view = view
        self._clock = clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What Rich calls for every frame."""
        view, now_s = self._view, self._clock()
        if view.stage is None:
            yield Text()
            return
        width, height = options.max_width, console.height
        elapsed = _since(view.stage_began_s, now_s)
        headline = Text(f"{view.headline()}; {elapsed} so far", style="bold")
        yield headline
        total, done = view.stage_total, view.stage_done
        if view.stage == "rollouts":
            total, done = view.blocks_total, view.blocks_done
        if total > 1:
            bar = Table.grid()
            bar.add_row(ProgressBar(total=total, completed=min(done, total), width=width))
            yield bar
        # A line stays free for the cursor, and one for what is printed above.
        left = height - len(headline.wrap(console, width)) - 3
        if view.stage == "rollouts" and len(view.cells_total) > 1:
            cells = _cells(view, width, left // 2)
            left -= len(cells)
            yield from cells
        yield from _workers(view, now_s, width, left)
        if view.stage == "training" and view.training is not None:
            yield losses_table(view.training)


def _cells(view: RunView, width: int, most: int) -> list[RenderableType]:
    """A line per backbone and method with rollouts to do: bar, rollouts, those at work, those that failed."""
    at_work: dict[str, int] = {}
    for flight in list(view.flights.values()):
        at_work[cell_of(flight.task)] = at_work.get(cell_of(flight.task), 0) + 1
    names = sorted(view.cells_total, key=natural)
    if len(names) > most:
        names.sort(key=lambda name: not at_work.get(name))
    open_ones = [name for name in names if view.cells_done[name] + view.cells_failed[name] < view.cells_total[name]]
    shown = names if len(names) <= most else open_ones[: max(1, most - 1)]
    longest = max(map(len, shown), default=0)
    lines: list[RenderableType] = []
    for name in shown:
        done, failed, total = view.cells_done[name], view.cells_failed[name], view.cells_total[name]
        line = Table.grid(padding=(0, 2))
        line.add_column(width=min(longest, max(8, width - 50)), no_wrap=True, overflow="ellipsis")
        line.add_column(width=max(8, min(40, width - longest - 40)))
        line.add_column(no_wrap=True)
        said = Text(f"{count(done)}/{count(total)}")
        if at_work.get(name):
            said.append(f", {at_work[name]} at work", style="dim")
        if failed:
            said.append(f", {count(failed)} failed", style="red")
        line.add_row(Text(name), ProgressBar(total=total, completed=done), said)
        lines.append(line)
    if rest := len(names) - len(shown):
        lines.append(Text(f"and {rest} more, {len(names) - len(open_ones)} of them done", style="dim"))
    return lines


def _workers(view: RunView, now_s: float, width: int, most: int) -> Iterable[RenderableType]:
    """Workers one by one, or in groups that fit."""
    flights = sorted(view.flights.items(), key=lambda item: natural(item[0]))
    if not flights:
        return
    if len(flights) <= most:
        rows = [_of_worker(view, now_s, worker, flight) for worker, flight in flights]
        if len({flight.node for _, flight in flights}) == 1:
            rows = [row[:-1] for row in rows]
        yield _fitted(rows, width, gives_way=1)
        return
    nodes = {f"node {flight.node[:_NODE_DIGITS]}" for _, flight in flights if flight.node}
    by_node = 1 < len(nodes) <= most
    groups = _grouped(view, now_s, flights, by_node=by_node)
    shown = groups if len(groups) <= most else groups[: max(1, most - 1)]
    yield _fitted(shown, width, gives_way=3 if by_node else 0)
    if rest := len(groups) - len(shown):
        yield Text(f"and {rest} more groups", style="dim")


def _of_worker(view: RunView, now_s: float, worker: str, flight: Flight) -> list[str]:
    unit = "block " if view.stage == "rollouts" else ""
    return [
        worker,
        flight.task.removeprefix(f"{ROLLOUTS}/"),
        f"{unit}{flight.done}/{flight.total}" if flight.total else "",
        flight.step,
        _since(flight.since_s, now_s),
        f"node {flight.node[:_NODE_DIGITS]}",
    ]


def _grouped(view: RunView, now_s: float, flights: Sequence[tuple[str, Flight]], *, by_node: bool) -> list[list[str]]:
    """Workers per node, with their methods counted, or per method: how many, how far, longest at one task."""
    groups: dict[str, list[Flight]] = {}
    for _, flight in flights:
        cell = cell_of(flight.task) if view.stage == "rollouts" else str(view.stage)
        name = f"node {flight.node[:_NODE_DIGITS]}" if by_node else cell
        groups.setdefault(name, []).append(flight)
    rows = []
    for name in sorted(groups, key=natural):
        members = groups[name]
        units = [(flight.done, flight.total) for flight in members if flight.total]
        done, total = (sum(column) for column in zip(*units, strict=True)) if units else (0, 0)
        longest = _since(min(flight.since_s for flight in members), now_s)
        unit = "blocks " if view.stage == "rollouts" else ""
        far = f"{unit}{count(done)}/{count(total)}" if units else "starting"
        cells = Counter(cell_of(flight.task) for flight in members)
        methods = ", ".join(f"{number} {cell}" for cell, number in sorted(cells.items())) if by_node else ""
        rows.append([name, counted(len(members), "worker"), far, methods, f"longest {longest}"])
    return rows


def _fitted(rows: Sequence[Sequence[str]], width: int, *, gives_way: int) -> Table:
    """Rows of one line each. The column `gives_way` is cut off first; then columns are left out, from the right."""
    rows = [list(row) for row in rows]
    columns = len(rows[0])

    def room(columns: int) -> int:
        """What is left for the column that gives way."""
        others = (max(len(row[column]) for row in rows) for column in range(columns) if column != gives_way)
        return width - sum(others) - _GAP * (columns - 1)

    while columns > 2 and room(columns) < _LEAST:
        columns -= 1
    grid = Table.grid(padding=(0, _GAP))
    for column in range(columns):
        grid.add_column(no_wrap=True, overflow="ellipsis", style="" if column == gives_way else "dim")
    for row in rows:
        cells = [Text(text) for text in row[:columns]]
        if gives_way < columns:
            cells[gives_way].truncate(max(1, room(columns)), overflow="ellipsis")
        grid.add_row(*cells)
    return grid


def _since(moment_s: float, now_s: float) -> str:
    # The driver of a job may be on a machine whose clock is ahead.
    return duration(max(0.0, now_s - moment_s))

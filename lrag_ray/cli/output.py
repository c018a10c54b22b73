"""What commands print: tables for people on stdout, one JSON object with ``--json``, errors on stderr.

This is the only place of the program that prints. All text passes `printable` here, because most of it comes from
files: run directories, prompts, videos and their names.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import partial, wraps
from typing import Any, ParamSpec

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from lrag_ray.errors import INTERRUPTED, LragError
from lrag_ray.events import Event, Notice
from lrag_ray.printable import json_text, plain, printable
from lrag_ray.printable import quantity as quantity
from lrag_ray.store.waits import reporting_waits

P = ParamSpec("P")

_WIDTH_WITHOUT_TERMINAL = 1_000_000
"""Nothing is wrapped for other programs."""
MOST_LISTED = 50
"""Lines of one list."""
_WIDEST = 500
"""Columns up to which a table may be wider than the terminal, so that no word in it is broken."""


class PrintableConsole(Console):
    """A console whose every character passes `printable`, whatever it is part of: text, tables, live displays.

    On a terminal, text is broken between words alone: paths, addresses and commands stay whole and can be copied.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print text, a table or anything else that Rich knows."""
        match objects:
            case (Table() as table,):
                self._print_table(table)
            case (str() as text,) if not options:
                say(self, text, 0)
            case _:
                super().print(*objects, **options)

    def _print_table(self, table: Table) -> None:
        if table.title:
            # Rich would break it at the width of the table.
            super().print(Text(str(table.title), style=table.title_style or ""), soft_wrap=True)
        bare = copy(table)
        bare.title = bare.caption = None
        wide = self.options.update(max_width=_WIDTH_WITHOUT_TERMINAL)
        least = min(Measurement.get(self, wide, bare).minimum, _WIDEST)
        shown = Segments(self.render(bare, self.options.update(max_width=max(self.width, least))))
        super().print(shown, crop=False, end="")
        if table.caption:
            # Likewise, and for other programs as well.
            say(self, str(table.caption), 0)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of anything that is shown; only Rich's own cursor movements are left as they are."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        """Plain text, replaced before it is measured, so that columns fit."""
        return super().render_str(printable(text), **options)


def console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: nothing in it is markup, nothing steers the terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
    return PrintableConsole(file=stream, markup=False, highlight=False, emoji=False, width=width)


def print_json(value: Any) -> None:
    """Print plain data, a dataclass, a named tuple or a pydantic record as JSON."""
    print(json_text(plain(value), indent=2))


def write(text: str, *, stderr: bool = False, end: str = "\n") -> None:
    """Print text in one piece, without tables and colours."""
    print(printable(text), file=sys.stderr if stderr else sys.stdout, end=end, flush=stderr)


def notices(event: Event) -> None:
    """A listener of commands without progress: what a person should read, on stderr."""
    if isinstance(event, Notice):
        write(event.text, stderr=True)


def tells_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose LragErrors become a message on stderr and their exit code, and Ctrl-C code 130.

    Bugs keep their traceback. Where it waits for storage, that is reported on stderr.
    """

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with reporting_waits(partial(write, stderr=True)):
                command(*args, **kwargs)
        except LragError as error:
            if kwargs.get("as_json"):
                wrapped = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
                write(json_text(wrapped), stderr=True)
            else:
                write(f"error: {error}", stderr=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            write("interrupted", stderr=True)
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def say(to: Console, line: str, indent: int = 6, *, style: str = "") -> None:
    """Print a line, its first word in `style`: on a terminal broken between words, the rest indented; elsewhere in one
    piece, for other programs.

    What cannot be broken (paths, addresses) stays whole, so that it can be copied.
    """
    shown = line
    if to.is_terminal:
        hang = " " * indent
        parts = shown.split("\n")
        folded = (
            textwrap.fill(
                part.strip() if position else part,
                to.width,
                initial_indent=hang if position else "",
                subsequent_indent=hang,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for position, part in enumerate(parts)
        )
        shown = "\n".join(folded)
    text = Text(printable(shown))
    if style:
        begins = len(shown) - len(shown.lstrip())
        text.stylize(style, begins, begins + len(shown.lstrip().split(" ", 1)[0]))
    to.print(text, soft_wrap=True)


def first_of(lines: Iterable[str]) -> Iterator[str]:
    """The first lines and how many more there are: a stranger's file may hold any number of faults."""
    more = 0
    for number, line in enumerate(lines):
        if number < MOST_LISTED:
            yield line
        else:
            more += 1
    if more:
        yield f"and {count(more)} more; --json names all"


def print_lines(to: Console, title: str, lines: Iterable[str]) -> None:
    """A list under its title; nothing where it is empty."""
    listed = list(first_of(lines))
    if listed:
        to.print(f"{title}:")
        for line in listed:
            say(to, f"  {line}")


def count(value: float) -> str:
    """``1,228,800``."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``5 h 12 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key in which worker-2 comes before worker-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]

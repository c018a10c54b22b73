"""The live display in a notebook: one output of the cell that is drawn anew, and lines below it."""

from __future__ import annotations

import importlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from lrag_ray.cli.live import LiveView
from lrag_ray.cli.output import PrintableConsole
from lrag_ray.cli.run_view import RunView
from lrag_ray.events import Event, Listener

_COLUMNS, _LINES = 110, 40
_EVERY_S = 1.0
_FORMAT = '<pre style="line-height: 1.25; font-family: Menlo, Consolas, DejaVu Sans Mono, monospace">{code}</pre>'


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    # Whoever has not imported IPython is in no notebook, so nothing is imported to find out.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextmanager
def live_in_notebook(write: Callable[[str], None]) -> Iterator[Listener]:
    """A listener that draws below the cell until the block ends; `write` gets the lines that stay."""
    view = RunView()
    display: Any = importlib.import_module("IPython.display").display
    shown = display(_drawn(view), raw=True, display_id=True)
    ended = threading.Event()

    def redraw() -> None:
        # By the clock, so that times continue while no event comes.
        while not ended.wait(_EVERY_S):
            shown.update(_drawn(view), raw=True)

    def receive(event: Event) -> None:
        if line := view.take(event):
            write(line)

    thread = threading.Thread(target=redraw, name="notebook-display", daemon=True)
    thread.start()
    try:
        yield receive
    finally:
        ended.set()
        thread.join()
        view.stage = None
        shown.update(_drawn(view), raw=True)


def _drawn(view: RunView) -> dict[str, str]:
    console: Console = PrintableConsole(
        file=io.StringIO(), record=True, width=_COLUMNS, height=_LINES, force_terminal=True, force_jupyter=False
    )
    console.print(LiveView(view), end="")
    html = console.export_html(inline_styles=True, code_format=_FORMAT, clear=False)
    return {"text/plain": console.export_text().strip(), "text/html": html}

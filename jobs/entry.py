"""What the entry points share: the log as a listener, errors as messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lrag_ray.errors import LragError
from lrag_ray.events import Event, Listener, Notice, StageAdvanced, StageBegan, StageEnded, as_json
from lrag_ray.printable import json_text, printable


def listener(progress: str) -> Listener:
    """Write one line per event to the job's log: every event as JSON, or for people those that matter."""
    return _write_json if progress == "json" else _write_line


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn an error of the user or the environment into a message and its exit code."""
    try:
        yield
    except LragError as error:
        print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _write_json(event: Event) -> None:
    print(json_text(as_json(event)), flush=True)


def _write_line(event: Event) -> None:
    match event:
        case Notice():
            print(printable(f"{'warning: ' if event.warning else ''}{event.text}"), flush=True)
        case StageBegan():
            print(f"{event.stage}: {event.total} tasks", flush=True)
        case StageAdvanced():
            print(f"{event.stage}: {event.done} of {event.total}", flush=True)
        case StageEnded():
            print(f"{event.stage}: done in {event.seconds:.1f} s", flush=True)

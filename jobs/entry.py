"""What the entry points share: the log as a listener, errors as messages and exit codes.

The log of a job is what `lrag-ray submit` and `lrag-ray logs` follow: as JSON, one event a line, with the time, kept
short, because Ray's log stream ends at very long lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lrag_ray
from lrag_ray.errors import LragError, RunEnvironmentError
from lrag_ray.events import Event, Listener, Notice, StageAdvanced, StageBegan, StageEnded, TaskAdvanced, log_record
from lrag_ray.printable import json_text, plain, printable
from lrag_ray.store.records import now_utc

LONGEST_LINE = 16_000
"""Characters of a line of the log."""
ADVANCED_EVERY_S = 5.0
"""A worker's progress is written this often, unless its step changes: a day of six workers is about 20 MB."""
_LONGEST_TEXTS = (4000, 400, 40)
_MOST_ITEMS = 20


def listener(progress: str) -> Listener:
    """Write one line per event to the job's log: every event as JSON, or for people those that matter."""
    return JsonLog(_print) if progress == "json" else _write_line


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn an error of the user or the environment into a message and its exit code."""
    try:
        yield
    except LragError as error:
        print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def check_client(client: str | None) -> None:
    """Refuse a client of another version (``version/numerics version``); None where there is none."""
    ours = f"{lrag_ray.__version__}/{lrag_ray.NUMERICS_VERSION}"
    if client is not None and client != ours:
        theirs, _, numerics = client.partition("/")
        raise RunEnvironmentError(
            f"lrag-ray {theirs} (numerics version {numerics}) submitted this job, and the nodes have "
            f"{lrag_ray.__version__} (numerics version {lrag_ray.NUMERICS_VERSION}). Fix: submit without --no-upload, "
            "so that the client's code runs, or use an image of that version"
        )


def report_outcome(outcome: object, progress: str) -> None:
    """The last line of a job's log: what it made, for whoever follows it."""
    if progress == "json":
        _print(short_json({"outcome": plain(outcome), "at": now_utc()}))


class JsonLog:
    """Every event as a line of JSON, a worker's progress every few seconds."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._advanced: dict[str, tuple[str, str, float]] = {}

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        if isinstance(event, TaskAdvanced):
            task, step, at_s = self._advanced.get(event.worker, ("", "", 0.0))
            now_s = self._clock()
            if (task, step) == (event.task, event.step) and now_s - at_s < ADVANCED_EVERY_S:
                return
            self._advanced[event.worker] = (event.task, event.step, now_s)
        self._write(short_json(log_record(event)))


def short_json(data: Mapping[str, Any]) -> str:
    """`data` as one line of at most `LONGEST_LINE` characters, long texts and lists in it cut."""
    text = json_text(data)
    for longest in _LONGEST_TEXTS:
        if len(text) <= LONGEST_LINE:
            break
        text = json_text(_cut(data, longest))
    return text if len(text) <= LONGEST_LINE else json_text({"event": data.get("event"), "cut": len(text)})


def _cut(value: Any, longest: int) -> Any:
    match value:
        case str() if len(value) > longest:
            return f"{value[:longest]}… ({len(value):,} characters)"
        case Mapping():
            return {key: _cut(item, longest) for key, item in list(value.items())[: 4 * _MOST_ITEMS]}
        case list() | tuple():
            return [_cut(item, longest) for item in value[:_MOST_ITEMS]]
        case _:
            return value


def _print(line: str) -> None:
    print(line, flush=True)


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

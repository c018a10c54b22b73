"""Following a job to its end: its log gives the events; where the log fails, storage says how far the run is."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lrag_ray.config.schema import StorageSection
from lrag_ray.engine.ray_jobs.client import RayJob, UnknownJobError
from lrag_ray.engine.ray_jobs.log import JobLog, Silence
from lrag_ray.errors import ClusterError, LragError
from lrag_ray.events import Listener, Notice, from_json, silent
from lrag_ray.pipelines.submit.submit import RUN_KEY, STOP_WAIT_S, SubmittedJob
from lrag_ray.store.lease import holder
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status

_LONGEST_SHOWN = 2000
_MOST_DIGITS = 20
_STORAGE_EVERY_S = 60.0
_STOP_POLL_S = 0.5
_STOP_SPARE_S = 30.0
_LACKING = re.compile(r"No module named '?([\w.]+)")


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    id: str
    run: str | None
    """Address of its run; None for a job that lrag-ray did not submit."""
    state: str
    exit_code: int
    """Of the job's own program; see `RayJob.exit_code`."""
    reason: str
    """Why, where the exit code does not say it."""
    outcome: Mapping[str, Any] = field(default_factory=dict)
    """What the job reported at its end, such as `RunOutcome`; empty where it could not."""


def follow(job: SubmittedJob, *, storage: StorageSection | None = None, listener: Listener = silent) -> JobEnd:
    """Report what the job reports until it has ended; Ctrl-C leaves it alone.

    `storage` is how its run is reached while the cluster does not answer. Raises ClusterError where the cluster
    stays silent or has forgotten the job, which a new head does; what is stored is not lost then.
    """
    client = job.client
    look = _StorageLook(job.run or None, storage or StorageSection(), listener)
    log = JobLog(client, job.id, on_outage=look.during_outage, warn=lambda text: listener(Notice(text, warning=True)))
    outcome: Mapping[str, Any] = {}
    last = ""
    try:
        for line in log.lines():
            if isinstance(line, Silence):
                if log.unreadable:
                    look.now_and_then()
            elif (found := outcome_in(line)) is not None:
                outcome = found
            else:
                last = line
                show(line, listener)
    except UnknownJobError:
        raise ClusterError(
            f"{client.url} no longer knows {job.id}: its head was restarted, and every job of it ended with it. What "
            "is stored stays; the same submit continues on the new head"
        ) from None
    end = _end(log.job or client.job(job.id), outcome)
    if end.exit_code == 1 and (lacking := _LACKING.search(last)):
        return replace(end, reason=_lacking_reason(lacking[1]))
    return end


def stop(job: SubmittedJob, listener: Listener = silent) -> JobEnd:
    """End a job and wait until it has: workers store what they have finished. ClusterError where it does not end."""
    client = job.client
    now = client.job(job.id)
    if not now.ended:
        client.stop(job.id)
        deadline = time.monotonic() + STOP_WAIT_S + _STOP_SPARE_S
        said_at = time.monotonic() + 5
        while not (now := client.job(job.id)).ended:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{job.id} was asked to stop and is still {now.state} after {STOP_WAIT_S + _STOP_SPARE_S:g} s. "
                    "Fix: look at its log, and ask again"
                )
            if time.monotonic() > said_at:
                said_at = float("inf")
                listener(Notice(f"waiting until {job.id} has stored what it has finished (at most {STOP_WAIT_S} s)"))
            time.sleep(_STOP_POLL_S)
            # A job whose environment is still being made learns of it only once it has begun.
            client.stop(job.id)
    return _end(now, {})


def job_log(job: SubmittedJob) -> str:
    """All that a job has written so far."""
    return job.client.log(job.id)


def show(line: str, listener: Listener) -> None:
    """Pass on a line of a job's log: the event that it holds, or what anybody else printed as a notice."""
    # Displays draw names again and again.
    event = from_json({key: _shortened(value) for key, value in _object_in(line).items()})
    if event is not None:
        listener(event)
    elif line.strip():
        listener(Notice(_shortened(line)))


def _shortened(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= _LONGEST_SHOWN:
        return value
    return f"{value[:_LONGEST_SHOWN]} … ({len(value):,} characters)"


def _lacking_reason(module: str) -> str:
    return (
        f"the Python of the head node has no module {module}. Fix: activate the environment before `ray start` there, "
        "or name its Python (--python); images that lack lrag-ray need the upload (no --no-upload)"
    )


def _end(job: RayJob, outcome: Mapping[str, Any]) -> JobEnd:
    return JobEnd(job.id, job.metadata.get(RUN_KEY), job.state, job.exit_code, job.reason, outcome)


def outcome_in(line: str) -> Mapping[str, Any] | None:
    """What a job reports as its last line, or None."""
    found = _object_in(line).get("outcome")
    return found if isinstance(found, dict) else None


def _object_in(line: str) -> Mapping[str, Any]:
    if not line.startswith("{"):
        return {}
    try:
        found = json.loads(line, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(digits: str) -> int:
    # No event counts so far, and displays divide by what it counts.
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


class _StorageLook:
    """What storage says of a run while its job cannot be heard."""

    def __init__(self, run: str | None, options: StorageSection, listener: Listener) -> None:
        self._run = run
        self._options = options
        self._listener = listener
        self._next = 0.0
        self._beat: bytes | None = None

    def during_outage(self, silent_s: float, error: str) -> bool:
        """Say that the cluster does not answer and what storage shows; whether the driver shows life there."""
        if silent_s == 0:
            self._next = 0.0
            self._listener(Notice(f"{error}\nLooking again until it answers", warning=True))
        return self.now_and_then()

    def now_and_then(self) -> bool:
        """Report the state of the run at most once a minute."""
        if self._run is None or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _STORAGE_EVERY_S
        try:
            run = RolloutRun(self._run, self._options)
            status = run_status(run)
            held = holder(run.storage)
        except LragError:
            # Only the nodes reach it.
            return False
        done = sum(cell.done for cell in status.cells)
        total = sum(cell.total for cell in status.cells)
        alive = held is not None and not held.is_released and held.beat != self._beat and self._beat is not None
        self._beat = held.beat if held is not None else None
        works = "; its driver is at work" if alive else ""
        self._listener(Notice(f"from storage: {done} of {total} results are there{works}"))
        return alive

"""The report of runs: what `lrag-ray report` does, while nobody else writes the same summary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from lrag_ray.events import Listener, silent
from lrag_ray.pipelines.lease import keep_lease
from lrag_ray.report import Report
from lrag_ray.report import report as make_report
from lrag_ray.store.lease import REPORT
from lrag_ray.store.rollouts import RolloutRun

_LEASE_TTL_S = 60.0


def report(
    run_dirs: Sequence[RolloutRun],
    *,
    to: str | None = None,
    suite: str | None = None,
    mode: str | None = None,
    strips: int | None = None,
    listener: Listener = silent,
    labels: Sequence[str | None] | None = None,
) -> Report:
    """`lrag_ray.report.report` of scores that must be there. A run's own summary waits for whoever is writing it.

    Raises StorageError and UsageError as that does, and LeaseError where the summary was taken over meanwhile.
    """
    own = run_dirs[0] if to is None and len(run_dirs) == 1 else None
    if own is not None:
        own.require()
    with (
        keep_lease(own.storage, "report", [REPORT], ttl_s=_LEASE_TTL_S, listener=listener, patient=True)
        if own is not None
        else nullcontext()
    ):
        return make_report(run_dirs, to=to, suite=suite, mode=mode, strips=strips, must_have=True, labels=labels)

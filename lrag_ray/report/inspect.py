"""Reading one rollout's trace back from a run directory."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from lrag_ray.config.redaction import redact
from lrag_ray.context.trace import TraceRow
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.store.parts import BrokenPartError, read_traces
from lrag_ray.store.records import HOW_TO_REPAIR, Commit, RolloutId
from lrag_ray.store.rollouts import RolloutRun

_ADDRESS = re.compile(
    r"^(?P<run>.+)/rollouts/(?P<backbone>[^/]+)/(?P<method>[^/]+)/(?P<prompt>[^/]+)-(?P<sample>\d+)/?$"
)


class InspectedRollout(NamedTuple):
    """A rollout's longest commit and what its blocks attended to."""

    commit: Commit
    prompt: str
    rows: list[TraceRow]


def inspect_rollout(address: str) -> InspectedRollout:
    """Trace of the rollout at ``RUN/rollouts/<backbone>/<method>/<prompt_id>-<sample>``, up to its longest commit.

    Raises UsageError for another kind of address, StorageError where the run, the rollout or a trace file is missing or
    damaged.
    """
    match = _ADDRESS.match(address)
    if match is None:
        raise UsageError(
            f"{redact(address)!r} is not a rollout: expected RUN/rollouts/<backbone>/<method>/<prompt_id>-<sample>, as "
            "`lrag-ray run` lays them out"
        )
    run_dir = RolloutRun(match["run"])
    identity = run_dir.require()
    rollout = RolloutId(
        backbone=match["backbone"], method=match["method"], prompt_id=match["prompt"], sample=int(match["sample"])
    )
    commits = run_dir.inventory(rollout).valid_commits(rollout)
    if not commits:
        raise StorageError(
            f"{run_dir.uri}/{rollout.path} has no commit: nothing of it is finished, or the name is mistyped "
            f"(`lrag-ray status {shlex.quote(run_dir.uri)}` lists the run's rollouts)"
        )
    commit = commits[max(commits)]
    try:
        rows = read_traces(run_dir.storage, commit.trace_parts)
    except BrokenPartError as error:
        raise StorageError(f"{run_dir.uri}: {error}. {HOW_TO_REPAIR}") from None
    prompt = identity.prompts[rollout.prompt_id].text if rollout.prompt_id in identity.prompts else ""
    return InspectedRollout(commit, prompt, rows)

"""How far a run is, from storage alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Literal, get_args

from lrag_ray.store.failures import read_failures
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.lease import holder
from lrag_ray.store.records import ROLLOUTS, FailureRecord, Record
from lrag_ray.store.rollouts import Inventory, RolloutRun, without_cycle_search

State = Literal["done", "partial", "failed", "pending"]
_STATES: tuple[State, ...] = get_args(State)
_RATE_WINDOW = timedelta(hours=1)


class CellStatus(Record):
    """Rollouts of one (backbone, method, duration) by state; the four counts add up to `total`."""

    backbone: str
    method: str
    duration_s: float
    latent_frames: int
    total: int
    """Prompts times samples."""
    done: int
    partial: int
    """Not done, but parts are stored that the next start continues from."""
    failed: int
    """Given up after `engine.max_attempts`; the next start tries again."""
    pending: int


class RunStatus(Record):
    """The whole run."""

    uri: str
    cells: list[CellStatus]
    commits_per_hour: float | None
    """Over the last hour of work, or None with fewer than two commits."""
    eta_s: float | None
    """Seconds until all cells are done at that rate, or None without a rate."""
    failures: list[FailureRecord]
    """The last failure of each quarantined task, of any stage; success clears it."""
    problems: list[str]
    """Records that do not count, with the reason; the next start makes again what commits among them named."""
    held_by: str | None
    """The driver that works on the run, and its last sign of life by its own clock; None where there is none. One that
    died on another machine is named until the next start takes over."""

    @property
    def done(self) -> bool:
        """Whether every cell is done for every prompt."""
        return all(cell.done == cell.total for cell in self.cells)


@without_cycle_search()
def run_status(run_dir: RolloutRun) -> RunStatus:
    """Status of the run at an address; StorageError where there is none."""
    identity = run_dir.require()
    inventory = run_dir.inventory()
    failures, broken = read_failures(run_dir.storage)
    quarantined = [failure for failure in failures if failure.quarantined]
    given_up = {failure.task: failure for failure in quarantined if failure.stage == ROLLOUTS}
    others = {(failure.stage, failure.task): failure for failure in quarantined if failure.stage != ROLLOUTS}
    counts, unfinished = _count(identity, inventory, given_up)
    cells = [
        CellStatus(
            backbone=backbone,
            method=method,
            duration_s=horizon.duration_s,
            latent_frames=horizon.latent_frames,
            total=len(identity.prompts) * identity.samples,
            **{state: counts[backbone, method, horizon.latent_frames, state] for state in _STATES},
        )
        for backbone in identity.backbones
        for method in identity.methods
        for horizon in identity.backbones[backbone].horizons
    ]
    rate = _commits_per_hour(inventory)
    left = sum(cell.total - cell.done - cell.failed for cell in cells)
    return RunStatus(
        uri=run_dir.uri,
        cells=cells,
        commits_per_hour=rate,
        eta_s=None if not rate else left / rate * 3600,
        failures=[
            *(given_up[path] for path in sorted(given_up) if path in unfinished),
            *(others[key] for key in sorted(others)),
        ],
        problems=[*(f"{state.path}: {state.problem}" for state in inventory.problems()), *broken],
        held_by=_held_by(run_dir),
    )


def _held_by(run_dir: RolloutRun) -> str | None:
    found = holder(run_dir.storage)
    if found is None or found.is_free:
        return None
    return f"{found}, last sign of life {found.sign.at if found.sign else 'not yet'}"


def _count(
    identity: RunIdentity, inventory: Inventory, given_up: Mapping[str, FailureRecord]
) -> tuple[Counter[tuple[str, str, int, State]], set[str]]:
    """Rollouts by (backbone, method, latent frames, state), and the paths of those that miss a horizon."""
    counts: Counter[tuple[str, str, int, State]] = Counter()
    unfinished = set()
    for rollout in identity.rollouts():
        path = rollout.path
        horizons = {horizon.latent_frames for horizon in identity.backbones[rollout.backbone].horizons}
        # The key costs a hash: only rollouts that have something on storage need it.
        done = inventory.covered(rollout, identity.rollout_keys(rollout)) if path in inventory.commits else set()
        state: State = "failed" if path in given_up else "partial" if path in inventory.part_records else "pending"
        if len(done) < len(horizons):
            unfinished.add(path)
        for latent_frames in horizons:
            counts[rollout.backbone, rollout.method, latent_frames, "done" if latent_frames in done else state] += 1
    return counts, unfinished


def _commits_per_hour(inventory: Inventory) -> float | None:
    times = sorted(
        datetime.fromisoformat(state.commit.created_at)
        for states in inventory.commits.values()
        for state in states.values()
        if state.commit is not None
    )
    recent = [time for time in times if times[-1] - time <= _RATE_WINDOW]
    if len(recent) < 2 or recent[-1] == recent[0]:
        return None
    return (len(recent) - 1) / ((recent[-1] - recent[0]) / timedelta(hours=1))

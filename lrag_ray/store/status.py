"""How far a run is, from storage alone."""

from __future__ import annotations

from datetime import datetime, timedelta

from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.records import FailureRecord, Record, RolloutId
from lrag_ray.store.run_dir import Inventory, RunDirectory

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
    """The last failure of each rollout that is given up."""
    problems: list[str]
    """Commits that do not count, with the reason; the next start makes them again."""

    @property
    def done(self) -> bool:
        """Whether every cell is done for every prompt."""
        return all(cell.done == cell.total for cell in self.cells)


def run_status(run_dir: RunDirectory) -> RunStatus:
    """Status of the run at an address; StorageError where there is none."""
    identity = run_dir.require()
    inventory = run_dir.inventory()
    given_up = {failure.rollout.path: failure for failure in run_dir.failures() if failure.quarantined}
    cells = [
        _cell(identity, inventory, given_up, backbone, method, horizon.duration_s, horizon.latent_frames)
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
        failures=[given_up[path] for path in sorted(given_up) if not _all_done(identity, inventory, given_up[path])],
        problems=[f"{state.path}: {state.problem}" for state in inventory.problems()],
    )


def _cell(
    identity: RunIdentity,
    inventory: Inventory,
    given_up: dict[str, FailureRecord],
    backbone: str,
    method: str,
    duration_s: float,
    latent_frames: int,
) -> CellStatus:
    counts = {"done": 0, "partial": 0, "failed": 0, "pending": 0}
    for prompt_id in identity.prompts:
        for sample in range(identity.samples):
            rollout = RolloutId(backbone=backbone, method=method, prompt_id=prompt_id, sample=sample)
            counts[_state(identity, inventory, given_up, rollout, latent_frames)] += 1
    return CellStatus(
        backbone=backbone,
        method=method,
        duration_s=duration_s,
        latent_frames=latent_frames,
        total=sum(counts.values()),
        **counts,
    )


def _state(
    identity: RunIdentity,
    inventory: Inventory,
    given_up: dict[str, FailureRecord],
    rollout: RolloutId,
    latent_frames: int,
) -> str:
    # The key costs a hash: only rollouts that have something on storage need it.
    if rollout.path in inventory.commits and inventory.covering(
        rollout, latent_frames, identity.rollout_key(rollout, latent_frames)
    ):
        return "done"
    if rollout.path in given_up:
        return "failed"
    return "partial" if inventory.frames_stored(rollout) else "pending"


def _all_done(identity: RunIdentity, inventory: Inventory, failure: FailureRecord) -> bool:
    rollout = failure.rollout
    return identity.knows(rollout) and all(
        inventory.covering(rollout, horizon.latent_frames, identity.rollout_key(rollout, horizon.latent_frames))
        for horizon in identity.backbones[rollout.backbone].horizons
    )


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

"""How far a run is, from storage alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Literal, get_args

from pydantic import ValidationError

from lrag_ray.config.schema import ScoringSection
from lrag_ray.errors import ConfigError
from lrag_ray.store.failures import read_failures
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.lease import RUN, at_work
from lrag_ray.store.records import ROLLOUTS, FailureRecord, Record
from lrag_ray.store.rollouts import Inventory, RolloutRun, without_cycle_search
from lrag_ray.store.run_dir import CONFIG_FILE

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
    """Quarantined after `engine.max_attempts`; the next start tries again."""
    pending: int


class ScoreStatus(Record):
    """The scores that the run was meant to have (``scoring`` in its config.json)."""

    suite: str
    pending: int | None
    """Committed videos without their scores, quarantined ones included; None for a plug-in, which is never imported
    because a run names it."""
    quarantined: int
    """Those of them that were quarantined."""


class RunStatus(Record):
    """The whole run."""

    uri: str
    cells: list[CellStatus]
    commits_per_hour: float | None
    """Over the last hour of work; None with fewer than two commits, and while nobody works on the run."""
    eta_s: float | None
    """Seconds until all cells are done at that rate, or None without a rate."""
    scores: ScoreStatus | None
    """None where no scores are asked for, or where the run does not say which."""
    failures: list[FailureRecord]
    """The last failure of each quarantined task, of any stage; success clears it."""
    problems: list[str]
    """Records that do not count, with the reason; the next start makes again what commits among them named."""
    held_by: str | None
    """Drivers that work on the run, since when, and their last signs of life by their own clocks; None where nobody
    does."""
    lost: str | None
    """The last drivers, where they neither ended properly nor showed a sign of life lately: they probably died."""

    @property
    def done(self) -> bool:
        """Whether every cell is done for every prompt, with its scores."""
        return all(cell.done == cell.total for cell in self.cells) and (self.scores is None or not self.scores.pending)

    @property
    def quarantined(self) -> bool:
        """Whether anything was quarantined."""
        return bool(self.failures)

    @property
    def settled(self) -> bool:
        """Whether nothing will change until someone starts the run again: the rest is quarantined."""
        if self.held_by is not None:
            return False
        scores_left = self.scores is not None and bool(self.scores.pending) and not self.scores.quarantined
        rollouts_left = any(cell.done + cell.failed < cell.total for cell in self.cells)
        return self.quarantined and not scores_left and not rollouts_left

    @property
    def exit_code(self) -> int:
        """1 where something was quarantined, else 0."""
        return int(self.quarantined)


@without_cycle_search()
def run_status(run_dir: RolloutRun, *, scores: bool = True) -> RunStatus:
    """Status of the run at an address. Without `scores` these are not looked at.

    Raises StorageError where there is no run, IdentityError where its record is another's.
    """
    identity = run_dir.require()
    inventory = run_dir.own_inventory(identity)
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
    workers = at_work(run_dir.storage)
    rate = _commits_per_hour(inventory) if RUN in workers.kinds else None
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
        problems=[
            *(f"{state.path}: {state.problem}" for state in inventory.problems()),
            *broken,
            *_config_problems(run_dir),
        ],
        scores=_scores(run_dir, {task for stage, task in others if stage == "scoring"}) if scores else None,
        held_by=workers.held_by,
        lost=workers.lost,
    )


def _config_problems(run_dir: RolloutRun) -> list[str]:
    from lrag_ray.scoring.intended import intended_scores

    damaged = intended_scores(run_dir.storage).damaged
    return [f"{CONFIG_FILE}: damaged, so it is not known which scores the run was meant to have"] if damaged else []


def _scores(run_dir: RolloutRun, quarantined: set[str]) -> ScoreStatus | None:
    # Suites bring torch along, and there may be no scores to look for.
    from lrag_ray.scoring.intended import intended_scores
    from lrag_ray.scoring.registry import suite_of

    intended = intended_scores(run_dir.storage)
    if intended.plug_in is not None:
        return ScoreStatus(suite=intended.plug_in, pending=None, quarantined=len(quarantined))
    if not intended.section:
        return None
    try:
        suite = suite_of(ScoringSection.model_validate(intended.section))
    except (ValidationError, ConfigError, ValueError):
        return None
    if suite is None:
        return None
    try:
        pending = {task.name for task in suite.pending(run_dir)}
    except ConfigError:
        # A judge's model is never taken from a run directory.
        return ScoreStatus(suite=suite.label, pending=None, quarantined=len(quarantined))
    return ScoreStatus(suite=suite.label, pending=len(pending), quarantined=len(pending & quarantined))


def _count(
    identity: RunIdentity, inventory: Inventory, given_up: Mapping[str, FailureRecord]
) -> tuple[Counter[tuple[str, str, int, State]], set[str]]:
    """Rollouts by (backbone, method, latent frames, state), and the paths of those that miss a horizon."""
    counts: Counter[tuple[str, str, int, State]] = Counter()
    unfinished = set()
    for rollout in identity.rollouts_at({*inventory.commits, *inventory.part_records, *given_up}):
        path = rollout.path
        horizons = {horizon.latent_frames for horizon in identity.backbones[rollout.backbone].horizons}
        # The key costs a hash: only rollouts that have something on storage need it.
        done = inventory.covered(rollout, identity.rollout_keys(rollout)) if path in inventory.commits else set()
        state: State = "failed" if path in given_up else "partial" if path in inventory.part_records else "pending"
        if len(done) < len(horizons):
            unfinished.add(path)
        for latent_frames in horizons:
            counts[rollout.backbone, rollout.method, latent_frames, "done" if latent_frames in done else state] += 1
    total = len(identity.prompts) * identity.samples
    for name, backbone in identity.backbones.items():
        for method in identity.methods:
            # What nothing is stored of was not looked at.
            for latent_frames in {horizon.latent_frames for horizon in backbone.horizons}:
                seen = sum(counts[name, method, latent_frames, state] for state in _STATES)
                counts[name, method, latent_frames, "pending"] += total - seen
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

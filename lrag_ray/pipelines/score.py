"""Score the videos of a run: everything that `lrag-ray score RUN` does is `score_run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import INTERRUPTED, ConfigError
from lrag_ray.events import Listener, Notice, StageBegan, StageEnded, silent
from lrag_ray.pipelines.scoring import (
    ScoringOutcome,
    check_scoring,
    pending_scores,
    score_pending,
    set_aside_damaged,
)
from lrag_ray.report.build import report
from lrag_ray.scoring.vbench_long.names import Mode
from lrag_ray.store.rollouts import RolloutRun


@dataclass(frozen=True)
class RunScores:
    """How scoring a run ended."""

    exit_code: int
    """0 all done, 1 some videos have no score, 130 interrupted."""
    uri: str
    suite: str
    mode: Mode | None
    """Of VBench-Long."""
    videos_scored: int
    """By this start."""
    failed: dict[str, str]
    """Reason by video."""
    report_folder: str
    """Where tables and page lie; empty after an interruption."""
    report_files: Sequence[str]
    seconds: float


def is_run(address: str) -> bool:
    """Whether there is a run at `address`; StorageError if it cannot be told."""
    if "://" not in address:
        place = Path(address).expanduser()
        if place.exists() and not place.is_dir():
            return False
    return RolloutRun(address).read() is not None


def score_run(config: RunConfig, *, progress: Listener = silent) -> RunScores:
    """Score what the run at ``run.uri`` has committed with ``config.scoring``, and write its report again.

    Raises StorageError where there is no run; ConfigError for suite none; WeightsError for networks that are missing;
    ClusterError. Ctrl-C gives exit code 130; what is scored stays.
    """
    began = time.monotonic()
    config = with_absolute_paths(config)
    scoring = config.scoring
    if scoring.suite == "none":
        raise ConfigError("scoring.suite is none: choose one with --suite preview or --suite vbench_long")
    run = RolloutRun(config.run.uri, config.storage)
    run.require()
    check_scoring(run, config)
    mode = scoring.mode if scoring.suite == "vbench_long" else None
    outcome, exit_code = ScoringOutcome(0, {}), 0
    # A commit that does not count has a video all the same, which would be missing without a word.
    failed = {state.path: f"the commit does not count: {state.problem}" for state in run.inventory().problems()}
    folder, files = "", list[str]()
    try:
        if videos := pending_scores(run, config):
            with ray_session(config.engine):
                stage_began = time.monotonic()
                progress(StageBegan("scoring", len(videos)))
                outcome = score_pending(run, config, progress, items=videos)
                progress(StageEnded("scoring", time.monotonic() - stage_began))
        made = report([run], suite=scoring.suite, mode=mode)
        folder, files = made.folder or "", list(made.files)
        failed |= made.data.scores.failures | outcome.failures
        failed |= set_aside_damaged(run, config, made.data.scores.damaged)
    except KeyboardInterrupt:
        progress(Notice("interrupted; the same command continues", warning=True))
        exit_code = INTERRUPTED
    return RunScores(
        exit_code=exit_code or int(bool(failed)),
        uri=run.uri,
        suite=scoring.suite,
        mode=mode,
        videos_scored=outcome.scored,
        failed=failed,
        report_folder=folder,
        report_files=files,
        seconds=time.monotonic() - began,
    )

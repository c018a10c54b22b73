"""Score the videos of a run: everything that `lrag-ray score RUN` does is `score_run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import ConfigError
from lrag_ray.events import Listener, silent
from lrag_ray.pipelines.job import Job
from lrag_ray.pipelines.scoring import RunScoring, report_events
from lrag_ray.report.build import report
from lrag_ray.store.lease import REPORT
from lrag_ray.store.rollouts import RolloutRun


@dataclass(frozen=True)
class RunScores:
    """How scoring a run ended."""

    exit_code: int
    """0 all done, 1 some videos have no score, 130 interrupted."""
    uri: str
    suite: str
    mode: str | None
    """Of suites that have modes."""
    videos_scored: int
    """By this start."""
    failed: dict[str, str]
    """Reason by video."""
    report_folder: str
    """Where tables and page are; empty after an interruption."""
    report_files: Sequence[str]
    seconds: float


def is_run(address: str) -> bool:
    """Whether there is a run at `address`; StorageError if that cannot be determined."""
    if "://" not in address:
        place = Path(address).expanduser()
        if place.exists() and not place.is_dir():
            return False
    return RolloutRun(address).read() is not None


def score_run(config: RunConfig, *, listener: Listener = silent) -> RunScores:
    """Score what the run at ``run.uri`` has committed with ``config.scoring``, and write its report again.

    Raises StorageError where there is no run; ConfigError for suite none; WeightsError for networks that are missing;
    ClusterError. Ctrl-C gives exit code 130; what is scored stays.
    """
    return ScoreJob(config, listener).start()


class ScoreJob(Job[RunScores]):
    """One start of scoring a run."""

    command = "score"

    def __init__(self, config: RunConfig, listener: Listener) -> None:
        config = with_absolute_paths(config)
        run = RolloutRun(config.run.uri, config.storage)
        super().__init__(run.storage, config.engine, listener)
        self._run = run
        self._scoring = RunScoring(run, config.scoring, config.engine)
        if self._scoring.suite is None:
            raise ConfigError("scoring.suite is none: choose one with --suite preview or --suite vbench_long")
        self._suite = self._scoring.suite
        self._name = config.scoring.suite
        self._folder = ""
        self._files: list[str] = []
        prompts = run.require().prompts.items()
        self._scoring.check({f"prompt {prompt_id} of {run.uri}": prompt.text for prompt_id, prompt in prompts})

    @property
    def kinds(self) -> Sequence[str]:
        """The scores of its suite: another suite may work beside it."""
        return [self._suite.folder]

    def do(self) -> None:
        """Score what is pending, then write the report."""
        # A commit that does not count has a video all the same, which would be missing silently.
        for state in self._run.inventory().problems():
            self.missing[state.path] = f"the commit does not count: {state.problem}"
        if tasks := self._scoring.pending():
            with ray_session(self.engine), self.stage("scoring", len(tasks)):
                self._scoring.score(tasks, self.report)
            scored = self.finished.get("scoring", set())
            self.wait_until_listed(lambda: scored & {task.title for task in self._scoring.pending()})
        with self.leased([REPORT], patient=True):
            made = report([self._run], suite=self._suite)
        self._folder, self._files = made.folder or "", list(made.files)
        for event in report_events(made):
            self.report(event)
        self.missing |= self._scoring.missing(made.data.suite, made.data.scores, self.report)

    def outcome(self, exit_code: int) -> RunScores:
        """What was scored and what was not."""
        return RunScores(
            exit_code=exit_code,
            uri=self._run.uri,
            suite=self._name,
            mode=self._suite.mode or None,
            videos_scored=self.made["scoring"],
            failed=self.missing,
            report_folder=self._folder,
            report_files=self._files,
            seconds=self.seconds,
        )
